// Positions of bilinear interpolation, for the operator and the network.
#pragma once

#include "cuda/common/types.h"

// Positions of bilinear interpolation along one axis, as in torch's upsample_bilinear2d, align_corners=False. The sum
// is an explicit fma, so that all kernels round it in the same way.
template <typename A>
struct Axis {
  int pixels, small;
  A scale;

  Axis(int64_t pixels, int64_t small)
      : pixels(static_cast<int>(pixels)),
        small(static_cast<int>(small)),
        scale(static_cast<A>(small) / static_cast<A>(pixels)) {}

  __device__ A position(int i) const {
    const A position = fma(static_cast<A>(i) + A(0.5), scale, A(-0.5));
    return position > 0 ? position : A(0);
  }
  __device__ int before(A position) const {
    const int before = static_cast<int>(position);
    return before < small - 1 ? before : small - 1;
  }
  __device__ int after(int before) const { return before < small - 1 ? before + 1 : before; }

  // The first pixel with `before` at least `i`; `before` does not decrease.
  __device__ int start(int i) const {
    if (i <= 0) return 0;
    if (i >= small) return pixels;
    int first = static_cast<int>((static_cast<A>(i) + A(0.5)) / scale - A(0.5));
    first = first < pixels ? first : pixels - 1;
    while (first > 0 && before(position(first - 1)) >= i) --first;
    while (first < pixels && before(position(first)) < i) ++first;
    return first;
  }
};
