// Epilogues of `multiply`: functors that finish the sums of a product and store them.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/tile/matrix.h"

namespace seemore::SEEMORE_ISA {

// The target of a product: rows below `split` go to `first`, the others to `second`.
struct SplitRows {
  float *first, *second;
  int64_t first_row_stride, second_row_stride, split, rows;

  float* operator[](int64_t row) const {
    return row < split ? first + row * first_row_stride : second + (row - split) * second_row_stride;
  }
};

// Activations of sums of products of cells.
struct Identity {
  static Vec<float> apply(Vec<float> x) { return x; }
};
template <class Cell>
struct Gelu {
  static Vec<float> apply(Vec<float> x) { return gelu<float>(x); }
};
template <>
struct Gelu<Pair> {
  static Vec<float> apply(Vec<float> x) { return gelu_to_16_bits(x); }
};

// to = activation(sums)
template <class Activation>
struct StoreEpilogue {
  SplitRows to;
  template <int R, int V>
  void operator()(int64_t row, int64_t i, const Vec<float> (&sums)[R][V]) const {
    for (int r = 0; r < R && row + r < to.rows; ++r) {
      float* target = to[row + r] + i;
      for (int v = 0; v < V; ++v) store(target + v * kWidth, Activation::apply(sums[r][v]));
    }
  }
};

// to = x + activation(sums); `x` may be `to`
template <class Activation>
struct ResidualEpilogue {
  float* to;
  const float* x;
  int64_t row_stride, x_row_stride, rows;
  template <int R, int V>
  void operator()(int64_t row, int64_t i, const Vec<float> (&sums)[R][V]) const {
    for (int r = 0; r < R && row + r < rows; ++r) {
      for (int v = 0; v < V; ++v) {
        const int64_t place = i + v * kWidth;
        const Vec<float> y = Activation::apply(sums[r][v]);
        store(to + (row + r) * row_stride + place, load(x + (row + r) * x_row_stride + place) + y);
      }
    }
  }
};

// GELU(sums) as cells
template <class Cell>
struct GeluCellEpilogue {
  Cell* to;
  int64_t row_stride, rows;
  template <int R, int V>
  void operator()(int64_t row, int64_t i, const Vec<float> (&sums)[R][V]) const {
    constexpr int G = kChannels<Cell>;
    for (int r = 0; r < R && row + r < rows; r += G) {
      for (int v = 0; v < V; ++v) {
        Vec<float> y[G];
        for (int g = 0; g < G; ++g) y[g] = Gelu<Cell>::apply(sums[r + g][v]);
        store_cells(to + (row + r) / G * row_stride + i + v * kWidth, y);
      }
    }
  }
};

}  // namespace seemore::SEEMORE_ISA
