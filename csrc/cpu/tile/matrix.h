// Products of small matrices with rows of pixels, of which every dense and pointwise convolution of the network
// consists.
//
// Pixels lie in rows, channel after channel; a cell is an element of a row: a float or double, one channel, or a Pair,
// two channels in bfloat16, of which vdpbf16ps adds up two products at once. A vector holds the cells of consecutive
// pixels and a weight is broadcast, so that every lane works whatever the number of channels.
#pragma once

#include "cpu/simd/vec.h"

namespace seemore::SEEMORE_ISA {

// Channels 2g (low half) and 2g + 1 (high half) of a pixel.
struct Pair {
  uint32_t bits;
};

template <class Cell>
constexpr int64_t kChannels = 1;
template <>
constexpr int64_t kChannels<Pair> = 2;

template <class Cell>
constexpr int64_t cells_of(int64_t channels) {
  return (channels + kChannels<Cell> - 1) / kChannels<Cell>;
}

constexpr int64_t kWidth = kLanes<float>;  // pixels in a vector of floats

inline uint32_t bfloat16_of(float value) {
  BFloat16 half;
  store_one(&half, value);
  return half.bits;
}

inline void store_cells(float* to, const Vec<float> (&v)[1]) { store(to, v[0]); }

inline void store_cells(Pair* to, const Vec<float> (&v)[2]) {
#if defined(__AVX512BF16__)
  // Elements 0 to 15 are v[0]'s, 16 to 31 v[1]'s.
  const auto halves = bit_cast<VectorOf<uint16_t>::type>(_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]));
  const auto pairs = __builtin_shufflevector(halves, halves, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                             24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  std::memcpy(to, &pairs, sizeof(pairs));
#else
  Vec<uint32_t> rounded[2];
  for (int i = 0; i < 2; ++i) {
    const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v[i]);
    rounded[i] = v[i] == v[i] ? bits + 0x7fff + ((bits >> 16) & 1) : Vec<uint32_t>{} + 0x7fc00000u;
  }
  const Vec<uint32_t> pairs = (rounded[0] >> 16) | (rounded[1] & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof(pairs));
#endif
}

inline void store_weight(float* to, const float (&channel)[1]) { *to = channel[0]; }
inline void store_weight(double* to, const double (&channel)[1]) { *to = channel[0]; }
inline void store_weight(Pair* to, const float (&channel)[2]) {
  to->bits = bfloat16_of(channel[0]) | bfloat16_of(channel[1]) << 16;
}

// One or two products of each lane, added to a sum in float32.
template <class Cell>
struct Product {
  explicit Product(const Cell* cells) : x(load(cells)) {}
  void add(Vec<Cell>& sum, Cell weight) const { sum += x * weight; }
  Vec<Cell> x;
};

template <>
struct Product<Pair> {
#if defined(__AVX512BF16__)
  explicit Product(const Pair* cells) { std::memcpy(&x, cells, sizeof(x)); }
  void add(Vec<float>& sum, Pair weight) const {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, x, (__m512bh)_mm512_set1_epi32(weight.bits));
  }
  __m512bh x;
#else
  explicit Product(const Pair* cells) {
    Vec<uint32_t> bits;
    std::memcpy(&bits, cells, sizeof(bits));
    low = bit_cast<Vec<float>>(bits << 16), high = bit_cast<Vec<float>>(bits & 0xffff0000u);
  }
  void add(Vec<float>& sum, Pair weight) const {
    sum += low * bit_cast<float>(weight.bits << 16);
    sum += high * bit_cast<float>(weight.bits & 0xffff0000u);
  }
  Vec<float> low, high;
#endif
};

// The channels of a row of pixels to be multiplied, from the first pixel on.
template <class Cell>
struct Source {
  const Cell* cells;
  int64_t row_stride;  // from one channel's (or two channels') cells to the next
};

// A register tile has six rows, whose sums fit the registers; the number of rows is even, for pairs. The weights lie in
// the order of their use: [register tile][source][cell][row of the tile].
constexpr int64_t register_tile_rows(int64_t rows_left) { return rows_left >= 6 ? 6 : rows_left >= 4 ? 4 : 2; }

template <class Cell>
struct Matrix {
  int64_t rows;     // even: a last row of zeros is added to an odd number
  int64_t sources;  // of `cells` each, but the last one, which may have its own number
  int64_t cells, last_cells;
  Cell* weights;
  Accumulate<Cell>* bias;

  int64_t size() const { return rows * ((sources - 1) * cells + last_cells); }
};

// The allocator of parts of a block of memory; from null, it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* allocate(int64_t count) {
    T* part = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += round_up(count * sizeof(T), 64);
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

template <class Cell>
Matrix<Cell> allocate_matrix(Arena& arena, int64_t rows, int64_t sources, int64_t channels, int64_t last_channels) {
  Matrix<Cell> matrix{round_up(rows, 2), sources, cells_of<Cell>(channels), cells_of<Cell>(last_channels),
                      nullptr,           nullptr};
  matrix.weights = arena.allocate<Cell>(matrix.size());
  matrix.bias = arena.allocate<Accumulate<Cell>>(matrix.rows);
  return matrix;
}

template <class Cell>
Matrix<Cell> allocate_matrix(Arena& arena, int64_t rows, int64_t sources, int64_t channels) {
  return allocate_matrix<Cell>(arena, rows, sources, channels, channels);
}

// Pack the weights element(row, source, channel); rows and channels beyond are zero.
template <class Cell, class Element>
inline void pack(const Matrix<Cell>& matrix, int64_t rows, int64_t channels, int64_t last_channels,
                 const Element& element) {
  Cell* to = matrix.weights;
  for (int64_t first = 0; first < matrix.rows; first += register_tile_rows(matrix.rows - first)) {
    for (int64_t s = 0; s < matrix.sources; ++s) {
      const bool is_last = s == matrix.sources - 1;
      const int64_t inputs = is_last ? last_channels : channels;
      for (int64_t cell = 0; cell < (is_last ? matrix.last_cells : matrix.cells); ++cell) {
        for (int64_t r = first; r < first + register_tile_rows(matrix.rows - first); ++r) {
          Accumulate<Cell> value[kChannels<Cell>];
          for (int64_t i = 0; i < kChannels<Cell>; ++i) {
            const int64_t channel = cell * kChannels<Cell> + i;
            value[i] = r < rows && channel < inputs ? element(r, s, channel) : 0;
          }
          store_weight(to++, value);
        }
      }
    }
  }
}

// sums += weights * sources, for R rows and V vectors of pixels from i on; returns the address of the next weights.
// Never inlined, and on a copy of the sums: otherwise the compiler would not keep them in registers.
template <int R, int V, class Cell>
__attribute__((noinline)) const Cell* add_products(Vec<Accumulate<Cell>> (&result)[R][V], const Cell* weight,
                                                   const Source<Cell>* sources, int64_t count, int64_t cells,
                                                   int64_t last_cells, int64_t i) {
  constexpr int64_t lanes = kLanes<Accumulate<Cell>>;
  Vec<Accumulate<Cell>> sums[R][V];
  std::memcpy(sums, result, sizeof(sums));
  for (int64_t s = 0; s < count; ++s) {
    const Cell* x = sources[s].cells + i;
    const int64_t row_stride = sources[s].row_stride;
    for (int64_t c = s == count - 1 ? last_cells : cells; c > 0; --c, x += row_stride, weight += R) {
      if constexpr (V == 1) {
        const Product<Cell> p0(x);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) p0.add(sums[r][0], weight[r]);
      } else {
        const Product<Cell> p0(x), p1(x + lanes), p2(x + (V > 2 ? 2 : 0) * lanes), p3(x + (V > 3 ? 3 : 0) * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          p0.add(sums[r][0], weight[r]);
          p1.add(sums[r][1], weight[r]);
          if constexpr (V > 2) p2.add(sums[r][2], weight[r]);
          if constexpr (V > 3) p3.add(sums[r][3], weight[r]);
        }
      }
    }
  }
  std::memcpy(result, sums, sizeof(sums));
  return weight;
}

// Call epilogue(row, i, sums) with the sums of R rows from `row` on and V vectors of pixels from i on.
template <int R, int V, class Cell, class Epilogue>
inline void multiply_register_tile(const Matrix<Cell>& matrix, const Cell* weight, int64_t row,
                                   const Source<Cell>* sources, int64_t i, const Epilogue& epilogue) {
  Vec<Accumulate<Cell>> sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = broadcast(matrix.bias[row + r]);
  }
  add_products(sums, weight, sources, matrix.sources, matrix.cells, matrix.last_cells, i);
  epilogue(row, i, sums);
}

// Vectors of a register tile: with 6 rows, their sums just fit the 32 registers, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// Call tile(Constant<R>, Constant<V>, row, i) for the register tiles of `rows` times `width` pixels, a multiple of a
// vector.
template <int64_t lanes = kWidth, class Tile>
inline void for_each_register_tile(int64_t rows, int64_t width, const Tile& tile) {
  const auto all_rows = [&](auto vectors, int64_t i) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) tile(Constant<6>(), vectors, row, i);
    if (row + 4 == rows) tile(Constant<4>(), vectors, row, i);
    if (row + 2 == rows) tile(Constant<2>(), vectors, row, i);
  };
  int64_t i = 0;
  for (; i + kTileVectors * lanes <= width; i += kTileVectors * lanes) all_rows(Constant<kTileVectors>(), i);
  if constexpr (kTileVectors > 2) {
    if (i + 2 * lanes <= width) {
      all_rows(Constant<2>(), i);
      i += 2 * lanes;
    }
  }
  if (i < width) all_rows(Constant<1>(), i);
}

template <class Cell, class Epilogue>
inline void multiply(const Matrix<Cell>& matrix, const Source<Cell>* sources, int64_t width, const Epilogue& epilogue) {
  const int64_t inputs = (matrix.sources - 1) * matrix.cells + matrix.last_cells;
  for_each_register_tile<kLanes<Accumulate<Cell>>>(matrix.rows, width, [&](auto r, auto v, int64_t row, int64_t i) {
    multiply_register_tile<decltype(r)::value, decltype(v)::value>(matrix, matrix.weights + row * inputs, row, sources,
                                                                   i, epilogue);
  });
}

}  // namespace seemore::SEEMORE_ISA
