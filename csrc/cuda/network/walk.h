// How blocks go through an image: each has a strip of columns and a band of rows, and walks down, kStep rows at a time.
//
// A step computes rows of intermediate results into a ring of rows in shared memory, with the columns that the strip's
// own results need beside them, and then the results. A warp has 16 columns and two rows of a step: four pixels a lane.
#pragma once

#include <algorithm>

#include "cuda/network/packed_weights.h"

namespace seemore::gpu {

constexpr int kStep = 4;
constexpr int kUnitColumns = 16, kUnitRows = 2, kPixels = 4;  // of a warp; of a lane
// Columns of a strip at most, and blocks of a multiprocessor: what its registers are enough for.
constexpr int most_columns(int channels) { return channels <= 48 ? 48 : 64; }
constexpr int blocks_of(int channels) { return channels <= 48 ? 2 : 1; }
constexpr int threads_of(int columns) { return columns / kUnitColumns * (kStep / kUnitRows) * kWarp; }

struct Walk {
  int height, width;
  int columns;  // of a strip with its halo: a multiple of kUnitColumns
  int left;     // of them, before the first that is its own
  int inner;    // its own
  int rows;     // of a band, a multiple of kStep
  int strips, bands;
  int64_t images;
  int start, stop;  // rows that are computed: [start, stop)

  int threads() const { return threads_of(columns); }
  int64_t blocks() const { return images * bands * strips; }
};

constexpr int kUsualMultiprocessors = 132;  // of an H200
constexpr int kBlocksAtOnce = 2;            // of a multiprocessor

// Strips of `columns`, of which `left` and `right` are halo; bands such that all blocks take the least time, where one
// begins with the work of `lead` rows; of at most `most` rows, a multiple of kStep.
inline Walk plan_walk(const Size& size, const Rows& computed, int columns, int left, int right, int lead,
                      int most = INT32_MAX) {
  if (std::max(size.height, size.width) > INT32_MAX / 4) {
    throw std::runtime_error("an image of " + std::to_string(size.height) + " x " + std::to_string(size.width) +
                             ", expected sides below 2^29");
  }
  const int start = static_cast<int>(computed.first), stop = static_cast<int>(computed.last);
  const int height = stop - start, inner = columns - left - right;
  Walk best{static_cast<int>(size.height),
            static_cast<int>(size.width),
            columns,
            left,
            inner,
            0,
            static_cast<int>(ceil_div(size.width, inner)),
            0,
            size.batch,
            start,
            stop};
  const int64_t at_once = kUsualMultiprocessors * kBlocksAtOnce;
  int64_t least = INT64_MAX;
  const int64_t most_bands = std::max<int64_t>(2 * at_once, ceil_div(height, most));
  for (int bands = 1; bands <= std::min<int64_t>(ceil_div(height, kStep), most_bands); ++bands) {
    const int rows = static_cast<int>(ceil_div(ceil_div(height, bands), kStep)) * kStep;
    const int64_t blocks = size.batch * best.strips * ceil_div(height, rows);
    const int64_t time = std::max(blocks, ceil_div(blocks, at_once) * at_once) * (rows + lead);
    if (time >= least || rows > most) continue;
    least = time;
    best.rows = rows, best.bands = static_cast<int>(ceil_div(height, rows));
  }
  return best;
}

// The columns of a strip: at most `columns`, such that a multiprocessor has the most warps, up to eight.
// ring_bytes(columns): shared memory of a block.
template <class Bytes>
int columns_of(int columns, Bytes ring_bytes) {
  constexpr int kLeastColumns = 32, kEnough = 8 * kWarp, kReserved = 1024;
  int64_t best = 0, most = 0;
  for (; columns >= kLeastColumns; columns -= kUnitColumns) {
    if (ring_bytes(columns) > most_shared_bytes()) continue;
    const int64_t blocks = shared_bytes_of_multiprocessor() / (ring_bytes(columns) + kReserved);
    const int64_t threads = std::min<int64_t>(blocks * threads_of(columns), kEnough);
    if (threads > most) best = columns, most = threads;
  }
  if (most == 0) throw std::runtime_error("network: the GPU's blocks have too little shared memory");
  return static_cast<int>(best);
}

// The same number, of which the compiler does not know that it has computed with it before: addresses that are computed
// twice take no registers in between.
__device__ inline int forgotten(int number) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// The block's part of the images; in shared memory, for whose registers there are better uses.
struct Part {
  int image;
  int first;        // column 0 of the strip, in the image
  int begin, end;   // its own columns
  int top, bottom;  // its own rows

  // Finds it, for all threads of the block.
  __device__ void find(const Walk& walk) {
    if (threadIdx.x == 0) {
      const unsigned strip = blockIdx.x % walk.strips, band = blockIdx.x / walk.strips;
      image = band / walk.bands;
      begin = strip * walk.inner;
      end = min(begin + walk.inner, walk.width);
      first = begin - walk.left;
      top = walk.start + band % walk.bands * walk.rows;
      bottom = min(top + walk.rows, walk.stop);
    }
    __syncthreads();
  }
  __device__ bool owns(int row, int column) const {
    return row >= top && row < bottom && column >= begin && column < end;
  }
};

// Ends what a warp does before: else the compiler reads the weights of all that follows in advance, which takes more
// registers than there are.
__device__ inline void part_of_work() { __syncwarp(); }

// The warp's part of a step.
struct Unit {
  Lane lane;
  int column;  // of the lane's pixels 0 and 2, in the strip; 1 and 3 are 8 to the right
  int row;     // of pixels 0 and 1, in the step; 2 and 3 are below

  __device__ explicit Unit(const Walk& walk) {
    const int warp = forgotten(threadIdx.x) / kWarp, tiles = walk.columns / kUnitColumns;
    static_assert(kStep == 2 * kUnitRows);
    row = warp < tiles ? 0 : kUnitRows;
    column = (warp < tiles ? warp : warp - tiles) * kUnitColumns + lane.pixel;
  }
  __device__ int column_of(int pixel) const { return column + 8 * (pixel % 2); }
  static __device__ int row_of(int pixel) { return pixel / 2; }
};

// Calls body(pixel, row, column, the pixel's number in all images, or -1 if there is none) for the lane's pixels;
// `row`: the first of the step, in the image.
template <class Body>
__device__ void for_pixels(const Walk& walk, const Part& part, const Unit& unit, int row, Body body) {
  const int first_y = forgotten(row) + unit.row, first_x = part.first + unit.column;
  const int64_t first = (int64_t(part.image) * walk.height + first_y) * walk.width + first_x;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int y = first_y + Unit::row_of(p), x = first_x + 8 * (p % 2);
    const bool is_inside = static_cast<unsigned>(y) < static_cast<unsigned>(walk.height) &&
                           static_cast<unsigned>(x) < static_cast<unsigned>(walk.width);
    body(p, y, x, is_inside ? first + Unit::row_of(p) * walk.width + 8 * (p % 2) : -1);
  }
}

// Pixels kCount * number and so on of an array.
template <int kCount, class Pixel, int kAll>
__device__ Pixel (&rows_of(Pixel (&pixels)[kAll], int number))
    [kCount] { return reinterpret_cast<Pixel(&)[kCount]>(pixels[kCount * number]); }

// Reads the lane's pixels of a step from memory; those outside the image are 0.
template <int kChannels>
__device__ void read_pixels(uint32_t (&to)[kPixels][kWords<kChannels>], const Features<kChannels>& from,
                            const Walk& walk, const Part& part, const Unit& unit, int row) {
  for_pixels(walk, part, unit, row, [&](int p, int, int, int64_t pixel) {
    if (pixel >= 0) {
      from.read(to[p], pixel, unit.lane);
    } else {
#pragma unroll
      for (uint32_t& word : to[p]) word = 0;
    }
  });
}

// sums = bias + weights x.
template <int kCount>
__device__ void pointwise(float (&sums)[kPixels][kCount][2], const uint32_t (&x)[kPixels][kCount], const uint4* weights,
                          const float* bias, const Unit& unit) {
  part_of_work();
  float start[kCount][2];
  read_channels<8 * kCount>(start, bias, unit.lane);
  multiply<Operand>(sums, x, weights, start);
}

template <class T, int kCount>
__device__ void normalise_all(uint32_t (&x)[kPixels][kCount], int channels) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) normalise<T>(x[p], channels);
}

// x = GELU of the sums' doubles
template <class T, int kCount>
__device__ void gelu_all(uint32_t (&x)[kPixels][kCount], const float (&sums)[kPixels][kCount][2]) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
#pragma unroll
    for (int word = 0; word < kCount; ++word) x[p][word] = gelu_of_doubles<T>(sums[p][word]);
  }
}

// x = GELU of the double of bias + weights x
template <class T, int kCount>
__device__ void pointwise_gelu(uint32_t (&x)[kPixels][kCount], const uint4* weights, const float* bias,
                               const Unit& unit) {
  float sums[kPixels][kCount][2];
  pointwise(sums, x, weights, bias, unit);
  gelu_all<T>(x, sums);
}

// x += sums, or GELU of their doubles
template <class T, bool kGelu, int kCount>
__device__ void add_to(uint32_t (&x)[kPixels][kCount], const float (&sums)[kPixels][kCount][2]) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      float pair[2], more[2];
      unpack_pair<T>(pair, x[p][word]);
      if constexpr (kGelu) {
        unpack_pair<Operand>(more, gelu_of_doubles<T>(sums[p][word]));
      } else {
        more[0] = sums[p][word][0], more[1] = sums[p][word][1];
      }
      x[p][word] = pack_pair<T>(pair[0] + more[0], pair[1] + more[1]);
    }
  }
}

// Writes a step's rows from `row` on to memory: those pixels that are the block's own.
template <int kChannels>
__device__ void write_own(const Features<kChannels>& to, const uint32_t (&from)[kPixels][kWords<kChannels>],
                          const Walk& walk, const Part& part, const Unit& unit, int row) {
  for_pixels(walk, part, unit, row, [&](int p, int y, int x, int64_t pixel) {
    if (part.owns(y, x)) to.write(pixel, from[p], unit.lane);
  });
}

}  // namespace seemore::gpu
