// Epilogues of `multiply`: where the sums of a product go, and what is done with them on the way.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/tile/matrix.h"

namespace seemore::SEEMORE_ISA {

// What to do with the sums of a product's rows: those below `split` go to one line, the rest to another.

struct Lines {
  float *first, *second;
  int64_t first_stride, second_stride, split, rows;

  float* operator[](int64_t row) const {
    return row < split ? first + row * first_stride : second + (row - split) * second_stride;
  }
};

// to = sums, or GELU(sums)
template <bool is_gelu>
struct Keep {
  Lines to;
  template <int R, int V>
  void operator()(int64_t row, int64_t i, const Vec<float> (&sums)[R][V]) const {
    for (int r = 0; r < R && row + r < to.rows; ++r) {
      float* line = to[row + r] + i;
      for (int v = 0; v < V; ++v) store(line + v * kWidth, is_gelu ? gelu<float>(sums[r][v]) : sums[r][v]);
    }
  }
};

// to = x + sums, or x + GELU(sums); `x` may be `to`
template <bool is_gelu>
struct Add {
  float* to;
  const float* x;
  int64_t stride, x_stride, rows;
  template <int R, int V>
  void operator()(int64_t row, int64_t i, const Vec<float> (&sums)[R][V]) const {
    for (int r = 0; r < R && row + r < rows; ++r) {
      for (int v = 0; v < V; ++v) {
        const int64_t place = i + v * kWidth;
        const Vec<float> y = is_gelu ? gelu<float>(sums[r][v]) : sums[r][v];
        store(to + (row + r) * stride + place, load(x + (row + r) * x_stride + place) + y);
      }
    }
  }
};

// GELU(sums) as cells
template <class Cell>
struct Activate {
  Cell* to;
  int64_t stride, rows;
  template <int R, int V>
  void operator()(int64_t row, int64_t i, const Vec<float> (&sums)[R][V]) const {
    constexpr int G = kChannels<Cell>;
    for (int r = 0; r < R && row + r < rows; r += G) {
      for (int v = 0; v < V; ++v) {
        Vec<float> y[G];
        for (int g = 0; g < G; ++g) y[g] = gelu<float>(sums[r + g][v]);
        store_cells(to + (row + r) / G * stride + i + v * kWidth, y);
      }
    }
  }
};

}  // namespace seemore::SEEMORE_ISA
