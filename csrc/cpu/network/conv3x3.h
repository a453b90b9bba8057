// Dense 3x3 convolution of two rows at once.
//
// In float32 down the columns by Winograd's F(2, 3): with d the four rows of input and g a column of the kernel,
//
//   m1 = (d1 + d2) (g0 + g1 + g2) / 2     m0 = (d0 - d2) g0     y0 = m0 + m1 + m2
//   m2 = (d2 - d1) (g0 - g1 + g2) / 2     m3 = (d3 - d1) g2     y1 = m3 + m1 - m2
//
// four products in place of six, and no less exact: sums are shorter. In bfloat16, where rounding d1 + d2 would cost
// accuracy and products are cheap, row by row.
#pragma once

#include "cpu/network/ring.h"

namespace seemore::SEEMORE_ISA {

template <class Cell>
constexpr bool kIsWinograd = kChannels<Cell> == 1;

template <class Cell>
Matrix<Cell> allocate_conv3x3(Arena& arena, int64_t rows, int64_t channels) {
  return allocate_matrix<Cell>(arena, rows, kIsWinograd<Cell> ? 12 : 9, channels);
}

// weight(row, channel, tap), taps row by row
template <class Cell, class Weight>
inline void pack_conv3x3(const Matrix<Cell>& to, int64_t rows, int64_t channels, const Weight& weight) {
  pack(to, rows, channels, channels, [&](int64_t r, int64_t s, int64_t c) -> float {
    if (!kIsWinograd<Cell>) return weight(r, c, s);
    const float g0 = weight(r, c, s % 3), g1 = weight(r, c, s % 3 + 3), g2 = weight(r, c, s % 3 + 6);
    const float of_product[]{0.5f * (g0 + g1 + g2), 0.5f * (g0 - g1 + g2), g0, g2};  // m1, m2, m0, m3
    return of_product[s / 3];
  });
}

template <class Cell>
class Conv3x3 {
 public:
  Conv3x3(const Strip& strip, const Matrix<Cell>& matrix, int64_t cells)
      : strip_(strip),
        matrix_(matrix),
        cells_(cells),
        row_stride_(kWidth + strip.widest),
        products_(strip.memory->allocate<Cell>(kIsWinograd<Cell> ? 4 * cells * row_stride_ : 0)) {}

  // Rows `row` and row + 1 around place i - 1, of rows whose places from -2 on can be read.
  template <class FirstEpilogue, class SecondEpilogue>
  void operator()(const Ring<Cell>& input, int64_t row, const FirstEpilogue& first,
                  const SecondEpilogue& second) const {
    if constexpr (kIsWinograd<Cell>) {
      transform(input, row);
      Source<Cell> sources[12];
      for (int s = 0; s < 12; ++s)
        sources[s] = {products_ + s / 3 * cells_ * row_stride_ + kWidth + s % 3 - 2, row_stride_};
      for_each_register_tile(matrix_.rows, strip_.width, [&](auto r, auto v, int64_t channel, int64_t i) {
        tile<decltype(r)::value, decltype(v)::value>(sources, channel, i, first, second);
      });
    } else {
      for (int y = 0; y < 2; ++y) {
        Source<Cell> sources[9];
        for (int s = 0; s < 9; ++s) sources[s] = {input[row + y - 1 + s / 3] + s % 3 - 2, input.row_stride()};
        y == 0 ? multiply(matrix_, sources, strip_.width, first) : multiply(matrix_, sources, strip_.width, second);
      }
    }
  }

 private:
  void transform(const Ring<Cell>& input, int64_t row) const {
    for (int64_t c = 0; c < cells_; ++c) {
      const float* d[4];
      for (int y = 0; y < 4; ++y) d[y] = input[row - 1 + y] + c * input.row_stride();
      float* to = products_ + c * row_stride_ + kWidth;
      const int64_t next = cells_ * row_stride_;
      for (int64_t i = -kWidth; i < strip_.width; i += kWidth) {
        const Vec<float> d1 = load(d[1] + i), d2 = load(d[2] + i);
        store(to + i, d1 + d2);
        store(to + next + i, d2 - d1);
        store(to + 2 * next + i, load(d[0] + i) - d2);
        store(to + 3 * next + i, load(d[3] + i) - d1);
      }
    }
  }

  template <int R, int V, class FirstEpilogue, class SecondEpilogue>
  void tile(const Source<Cell>* sources, int64_t row, int64_t i, const FirstEpilogue& first,
            const SecondEpilogue& second) const {
    const Cell* weight = matrix_.weights + row * 12 * cells_;
    Vec<float> m1[R][V]{}, m2[R][V]{}, y0[R][V], y1[R][V];
    weight = add_products(m1, weight, sources, 3, cells_, cells_, i);
    weight = add_products(m2, weight, sources + 3, 3, cells_, cells_, i);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        const Vec<float> biased = m1[r][v] + matrix_.bias[row + r];
        y0[r][v] = biased + m2[r][v];
        y1[r][v] = biased - m2[r][v];
      }
    }
    weight = add_products(y0, weight, sources + 6, 3, cells_, cells_, i);
    first(row, i, y0);
    add_products(y1, weight, sources + 9, 3, cells_, cells_, i);
    second(row, i, y1);
  }

  const Strip& strip_;
  const Matrix<Cell>& matrix_;
  int64_t cells_, row_stride_;
  Cell* products_;
};

}  // namespace seemore::SEEMORE_ISA
