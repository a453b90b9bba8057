// LayerNorm over the channels of pixels, forward and backward.
#pragma once

#include <cmath>

#include "cpu/simd/vec.h"

namespace seemore::SEEMORE_ISA {

// x <- (x - mean) / deviation over the channels of each pixel; scale: 1 / deviation, for the gradient. V vectors. The
// rounding of the mean may exceed small deviations from it, so the mean of these is subtracted from them.
template <int V, class A>
inline void normalise_vectors(A* x, int64_t row_stride, int64_t channels, A* scale, A eps) {
  Vec<A> mean[V]{}, rest[V]{}, square[V]{};
  const A share = 1 / static_cast<A>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) mean[v] += load(x + c * row_stride + v * kLanes<A>);
  }
  for (int v = 0; v < V; ++v) mean[v] *= share;
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      const Vec<A> d = load(x + c * row_stride + v * kLanes<A>) - mean[v];
      rest[v] += d, square[v] += d * d;
    }
  }
  for (int v = 0; v < V; ++v) {
    rest[v] *= share;
    Vec<A> deviation = square[v] * share - rest[v] * rest[v] + eps;
    for (int64_t i = 0; i < kLanes<A>; ++i) deviation[i] = std::sqrt(deviation[i]);
    square[v] = 1 / deviation;
    store(scale + v * kLanes<A>, square[v]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      A* at = x + c * row_stride + v * kLanes<A>;
      store(at, (load(at) - mean[v] - rest[v]) * square[v]);
    }
  }
}

template <class A>
inline void normalise_pixels(A* x, int64_t row_stride, int64_t channels, int64_t width, A* scale, A eps) {
  int64_t i = 0;
  for (; i + 4 * kLanes<A> <= width; i += 4 * kLanes<A>)
    normalise_vectors<4>(x + i, row_stride, channels, scale + i, eps);
  for (; i < width; i += kLanes<A>) normalise_vectors<1>(x + i, row_stride, channels, scale + i, eps);
}

// d <- (d - mean(d) - x * mean(d x)) * scale, means over the channels, x normalised: from the gradient of the
// normalised pixels to that of the pixels before.
template <int V, class A>
inline void normalise_backward_vectors(A* d, const A* x, int64_t row_stride, int64_t channels, const A* scale) {
  Vec<A> mean[V]{}, product[V]{};
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      const Vec<A> g = load(d + c * row_stride + v * kLanes<A>);
      mean[v] += g, product[v] += g * load(x + c * row_stride + v * kLanes<A>);
    }
  }
  for (int v = 0; v < V; ++v) mean[v] /= static_cast<A>(channels), product[v] /= static_cast<A>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      A* at = d + c * row_stride + v * kLanes<A>;
      const Vec<A> seen = load(x + c * row_stride + v * kLanes<A>);
      store(at, (load(at) - mean[v] - seen * product[v]) * load(scale + v * kLanes<A>));
    }
  }
}

template <class A>
inline void normalise_backward(A* d, const A* x, int64_t row_stride, int64_t channels, int64_t width, const A* scale) {
  int64_t i = 0;
  for (; i + 4 * kLanes<A> <= width; i += 4 * kLanes<A>) {
    normalise_backward_vectors<4>(d + i, x + i, row_stride, channels, scale + i);
  }
  for (; i < width; i += kLanes<A>) normalise_backward_vectors<1>(d + i, x + i, row_stride, channels, scale + i);
}

}  // namespace seemore::SEEMORE_ISA
