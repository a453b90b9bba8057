// LayerNorm of a row of pixels, and the product of its stencils with a gate, both to cells.
#pragma once

#include <cmath>

#include "cpu/tile/matrix.h"

namespace seemore::SEEMORE_ISA {

// LayerNorm over the channels of V vectors of pixels; weight and bias are null where the next layer includes them.
template <int V, class Cell>
inline void normalise_columns(Cell* to, int64_t to_row_stride, const float* x, int64_t row_stride, int64_t channels,
                              const float* weight, const float* bias) {
  constexpr int G = kChannels<Cell>;
  Vec<float> mean[V]{}, variance[V]{}, scale[V];
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) mean[v] += load(x + c * row_stride + v * kWidth);
  }
  for (int v = 0; v < V; ++v) mean[v] /= static_cast<float>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      const Vec<float> d = load(x + c * row_stride + v * kWidth) - mean[v];
      variance[v] += d * d;
    }
  }
  for (int v = 0; v < V; ++v) {
    const Vec<float> biased = variance[v] / static_cast<float>(channels) + 1e-6f;
    for (int64_t i = 0; i < kWidth; ++i) scale[v][i] = std::sqrt(biased[i]);
    scale[v] = 1.f / scale[v];
  }
  for (int64_t c = 0; c < channels; c += G) {
    for (int v = 0; v < V; ++v) {
      Vec<float> y[G]{};
      for (int g = 0; g < G && c + g < channels; ++g) {
        y[g] = (load(x + (c + g) * row_stride + v * kWidth) - mean[v]) * scale[v];
        if (weight) y[g] = y[g] * weight[c + g] + bias[c + g];
      }
      store_cells(to + c / G * to_row_stride + v * kWidth, y);
    }
  }
}

template <class Cell>
inline void normalise(Cell* to, int64_t to_row_stride, const float* x, int64_t row_stride, int64_t channels,
                      int64_t width, const float* weight, const float* bias) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= width; i += 4 * kWidth) {
    normalise_columns<4>(to + i, to_row_stride, x + i, row_stride, channels, weight, bias);
  }
  for (; i < width; i += kWidth) normalise_columns<1>(to + i, to_row_stride, x + i, row_stride, channels, weight, bias);
}

// Product of the channels' stencils with `factor`: cells(c) = factor[c] * stencil(c, i), a vector at place i.
template <class Cell, class Stencil>
inline void gate_row(Cell* to, int64_t to_row_stride, const float* factor, int64_t factor_row_stride, int64_t channels,
                     int64_t width, const Stencil& stencil) {
  constexpr int G = kChannels<Cell>;
  for (int64_t c = 0; c < channels; c += G) {
    const auto first = stencil(c), second = stencil(smaller(c + G, channels) - 1);
    for (int64_t i = 0; i < width; i += kWidth) {
      Vec<float> y[G]{};
      y[0] = first(i) * load(factor + c * factor_row_stride + i);
      if (G == 2 && c + 1 < channels) y[G - 1] = second(i) * load(factor + (c + 1) * factor_row_stride + i);
      store_cells(to + c / G * to_row_stride + i, y);
    }
  }
}

}  // namespace seemore::SEEMORE_ISA
