// Rings of rows in shared memory, which hold what neighbouring pixels read: the 3x3 convolution, depthwise
// convolutions.
#pragma once

#include "cuda/network/walk.h"

namespace seemore::gpu {

// Rows of features in shared memory, of which the last kRows are there, with a few more pixels before and after them:
// what beside the strip is read belongs to results that nobody stores.
template <int kChannels, int kRows>
struct Ring {
  static constexpr int kMore = 4;
  Features<kChannels> features;
  int columns;

  __host__ __device__ static int64_t bytes(int columns) {
    return 4 * Features<kChannels>::words(kRows * columns + kMore);
  }
  __device__ Ring(void* memory, int columns)
      : features(Features<kChannels>::at(memory, kRows * columns + kMore)), columns(columns) {}
  // The pixel's place; row: at least -kRows.
  __device__ static int place(int row, int column, int columns) { return (row + kRows) % kRows * columns + column + 1; }
  __device__ int operator()(int row, int column) const { return place(row, column, columns); }
  __device__ void write(int place, const uint32_t (&from)[kWords<kChannels>], const Lane& lane) const {
    features.write(place, from, lane);
  }
};

// Such rows as operands of products, whose words `read_matrices` reads: word i of a lane of a quad are channels
// 8 i + 2 lane and the next one. Eights of channels are 16 bytes; those of eight neighbouring pixels are moved within
// their pixels, so that they lie in different banks. `columns` is a multiple of 8.
template <int kChannels, int kRows>
struct MatrixRing : Ring<kChannels, kRows> {
  using Base = Ring<kChannels, kRows>;
  using Base::columns, Base::features;
  static constexpr int kTail = Features<kChannels>::kTail;

  __device__ MatrixRing(void* memory, int columns) : Base(memory, columns) {}

  // The first word of an eighth of a pixel's, of kEighths in this part of the features.
  template <int kEighths>
  static __device__ int word_of(int place, int eighth) {
    return 4 * (place * kEighths + (eighth ^ (place * kEighths / 8 % kEighths)));
  }

  __device__ void write(int place, const uint32_t (&from)[kWords<kChannels>], const Lane& lane) const {
    *reinterpret_cast<uint4*>(features.head + word_of<4>(place, lane.quarter)) =
        make_uint4(from[0], from[1], from[2], from[3]);
    if constexpr (kTail == 1) {
      features.tail[word_of<1>(place, 0) + lane.quarter] = from[4];
    } else if constexpr (kTail == 2) {
      *reinterpret_cast<uint2*>(features.tail + word_of<2>(place, lane.quarter / 2) + lane.quarter % 2 * 2) =
          make_uint2(from[4], from[5]);
    } else {
      *reinterpret_cast<uint4*>(features.tail + word_of<4>(place, lane.quarter)) =
          make_uint4(from[4], from[5], from[6], from[7]);
    }
  }

  // Places of words of the unit's row, within a row, `right` columns from its first pixel on.
  struct Words {
    int head, tail;

    __device__ Words(const Unit& unit, int right) {
      const int lane = threadIdx.x % kWarp, place = unit.column - unit.lane.pixel + lane % 16 + right;
      head = word_of<4>(place, lane / 16);
      tail = kTail == 2 ? word_of<2>(place, lane / 16) : kTail == 4 ? head : word_of<1>(place, 0);
    }
  };

  // Reads the unit's pixels, with rows from slots[0] and slots[1].
  __device__ void read(uint32_t (&to)[kPixels][kWords<kChannels>], const int (&slots)[2], const Words& words) const {
#pragma unroll
    for (int row = 0; row < kUnitRows; ++row) {
      auto &left = to[2 * row], &right = to[2 * row + 1];
#pragma unroll
      for (int word = 0; word < 4; word += 2) {
        read_matrices(left[word], right[word], left[word + 1], right[word + 1],
                      features.head + ((slots[row] * columns * 16 + words.head) ^ (4 * word)));
        if (kTail < word + 2) continue;
        read_matrices(left[4 + word], right[4 + word], left[5 + word], right[5 + word],
                      features.tail + ((slots[row] * columns * (4 * kTail) + words.tail) ^ (4 * word)));
      }
    }
    if constexpr (kTail == 1) {
      const int slot = threadIdx.x % kWarp < 16 ? slots[0] : slots[1];
      read_matrices(to[0][4], to[1][4], to[2][4], to[3][4], features.tail + slot * columns * 4 + words.tail);
    }
  }
};

// Writes a step's rows into a ring, from its row `ring_row` on.
template <class Ring, int kCount>
__device__ void store_ring(const Ring& ring, int ring_row, const uint32_t (&from)[kPixels][kCount], const Unit& unit) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    ring.write(ring(ring_row + unit.row + Unit::row_of(p), unit.column_of(p)), from[p], unit.lane);
  }
}

// The same; outside the image, of which they are the rows from `row` on, it is 0.
template <class Ring, int kCount>
__device__ void write_ring(const Ring& ring, int ring_row, uint32_t (&from)[kPixels][kCount], const Walk& walk,
                           const Part& part, const Unit& unit, int row) {
  for_pixels(walk, part, unit, row, [&](int p, int, int, int64_t pixel) {
    if (pixel >= 0) return;
#pragma unroll
    for (uint32_t& word : from[p]) word = 0;
  });
  store_ring(ring, ring_row, from, unit);
}

// Reads the pixels `shift` columns to the right of the lane's.
template <int kChannels, int kRows>
__device__ void read_ring(uint32_t (&to)[kPixels][kWords<kChannels>], const Ring<kChannels, kRows>& ring, int ring_row,
                          int shift, const Unit& unit) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    ring.features.read(to[p], ring(ring_row + unit.row + Unit::row_of(p), unit.column_of(p) + shift), unit.lane);
  }
}

// LayerNorm with its weight and bias, of a step's rows from `row` of the band on, into a ring; of those up to 1 +
// kExtra rows above and below the block's own.
template <class T, int kExtra, int kChannels, int kRows>
__device__ void norm_into(const MatrixRing<kChannels, kRows>& ring, const Features<kChannels>& x,
                          const ConvWeights& weights, int channels, const Walk& walk, const Part& part, int row) {
  constexpr int kCount = kWords<kChannels>;
  row += part.top;
  const Unit unit(walk);
  if (row + unit.row + 1 < part.top - 1 - kExtra || row + unit.row > part.bottom + kExtra) return;
  uint32_t words[kPixels][kCount];
  read_pixels(words, x, walk, part, unit, row);
  float weight[kCount][2], bias[kCount][2];
  read_channels<kChannels>(weight, weights.norm_weight, unit.lane);
  read_channels<kChannels>(bias, weights.norm_bias, unit.lane);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    float wide[kCount][2];
#pragma unroll
    for (int word = 0; word < kCount; ++word) unpack_pair<T>(wide[word], words[p][word]);
    normalise(wide, channels);
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      words[p][word] = pack_pair<Operand>(wide[word][0] * weight[word][0] + bias[word][0],
                                          wide[word][1] * weight[word][1] + bias[word][1]);
    }
  }
  write_ring(ring, row - part.top, words, walk, part, unit, row);
}

// Calls body(tap, slots of both rows, words of the unit's row) for the taps of a dense 3x3 convolution of a step's rows
// from `row` on.
template <int kChannels, int kRows, class Body>
__device__ void for_taps(const MatrixRing<kChannels, kRows>& ring, const Part& part, const Unit& unit, int row,
                         Body body) {
  constexpr int kUnrolled = kChannels > 40 ? 1 : 3;  // by what registers there are
#pragma unroll 1
  for (int y = 0; y < 3; ++y) {
    const int first = (row + unit.row + y - 1 - part.top + kRows) % kRows;
    const int slots[2] = {first, first + 1 == kRows ? 0 : first + 1};
#pragma unroll kUnrolled
    for (int x = 0; x < 3; ++x) body(3 * y + x, slots, typename MatrixRing<kChannels, kRows>::Words(unit, x));
  }
}

// sums += the dense 3x3 convolution of a step's rows from `row` on, but for its bias.
template <int kChannels, int kRows>
__device__ void conv3x3(float (&sums)[kPixels][kWords<kChannels>][2], const MatrixRing<kChannels, kRows>& ring,
                        const ConvWeights& weights, const Part& part, const Unit& unit, int row) {
  constexpr int kCount = kWords<kChannels>;
  for_taps(ring, part, unit, row, [&](int tap, const auto& slots, const auto& at) {
    uint32_t words[kPixels][kCount];
    ring.read(words, slots, at);
    multiply<Operand>(sums, words, weights.taps + tap * quads_of(kCount, kCount) * kWarp);
  });
}

// sums += a depthwise convolution of kTapRows x kTapColumns, of a step's rows from `row` on. taps: pixel 0 is the
// first.
template <int kTapRows, int kTapColumns, int kChannels, int kRows>
__device__ void depthwise(uint32_t (&sums)[kPixels][kWords<kChannels>], const Ring<kChannels, kRows>& ring,
                          const Features<kChannels>& taps, const Part& part, const Unit& unit, int row) {
  constexpr int kCount = kWords<kChannels>;
  using Tap = uint32_t[kCount];
  const int first = (row + unit.row - kTapRows / 2 - part.top + kRows) % kRows;
#pragma unroll 1  // or all taps are read in advance, for which there are no registers
  for (int x = 0; x < kTapColumns; ++x) {
    int slot = first;
    const auto add_row = [&](int y, Tap& of_upper, const Tap& of_lower, auto is_first, auto is_last) {
      constexpr bool kIsFirst = decltype(is_first)::value, kIsLast = decltype(is_last)::value;
      part_of_work();
      const int place = slot * ring.columns + unit.column + x - kTapColumns / 2 + 1;
      slot = slot + 1 == kRows ? 0 : slot + 1;
      if (!kIsLast) taps.read(of_upper, y * kTapColumns + x, unit.lane);
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        uint32_t words[kCount];
        ring.features.read(words, place + 8 * right, unit.lane);
#pragma unroll
        for (int word = 0; word < kCount; ++word) {
          uint32_t &upper = sums[right][word], &lower = sums[2 + right][word];
          if (!kIsLast) upper = multiply_add_pairs(of_upper[word], words[word], upper);
          if (!kIsFirst) lower = multiply_add_pairs(of_lower[word], words[word], lower);
        }
      }
    };
    static_assert(kTapRows % 2 == 1);
    Tap even, odd;  // of rows
    add_row(0, even, odd, std::true_type(), std::false_type());
#pragma unroll 1
    for (int y = 1; y < kTapRows; y += 2) {
      add_row(y, odd, even, std::false_type(), std::false_type());
      add_row(y + 1, even, odd, std::false_type(), std::false_type());
    }
    add_row(kTapRows, odd, even, std::false_type(), std::true_type());
  }
}

// The same, from the bias on, which is the last pixel of `taps`.
template <int kTapRows, int kTapColumns, int kChannels, int kRows>
__device__ void depthwise_with_bias(uint32_t (&sums)[kPixels][kWords<kChannels>], const Ring<kChannels, kRows>& ring,
                                    const uint32_t* taps, const Part& part, const Unit& unit, int row) {
  constexpr int kTaps = kTapRows * kTapColumns;
  const auto features = Features<kChannels>::at(const_cast<uint32_t*>(taps), kTaps + 1);
  features.read(sums[0], kTaps, unit.lane);
#pragma unroll
  for (int p = 1; p < kPixels; ++p) {
#pragma unroll
    for (int word = 0; word < kWords<kChannels>; ++word) sums[p][word] = sums[0][word];
  }
  depthwise<kTapRows, kTapColumns>(sums, ring, features, part, unit, row);
}

// x *= factors
template <int kCount>
__device__ void multiply_all(uint32_t (&x)[kPixels][kCount], const uint32_t (&factors)[kPixels][kCount]) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
#pragma unroll
    for (int word = 0; word < kCount; ++word) x[p][word] = multiply_pairs(x[p][word], factors[p][word]);
  }
}

}  // namespace seemore::gpu
