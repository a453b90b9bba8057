// The kernels of striped_conv, for K = 3, 7, 11 in float32, float16 and bfloat16: what they share.
#pragma once

#include "cuda/common/sweep.h"
#include "params/striped_conv.h"

namespace seemore {

// Writes (parts, B, C) sums of y, too, as many parts as striped_conv_sum_parts, unless `sums` is null.
void striped_conv_with_sums(const StripedConv& conv, const Image& y, float* sums, void* stream);
int64_t striped_conv_sum_parts(const StripedConv& conv);

}  // namespace seemore

// Warps on a multiprocessor, at least: what the registers suffice for, 168 each if 12. Going pixel by pixel takes more.
template <int K>
constexpr int kUnalignedWarps = K == 3 ? 12 : 8;

template <int K>
constexpr int kHaloQuads = ceil_div(K / 2, kQuad);

// A channel's taps, in registers, and its bias.
template <typename T, int K>
struct Taps {
  float weight[K], bias;

  __device__ Taps(const void* weights, const void* biases, int64_t channel)
      : bias(widen(static_cast<const T*>(biases)[channel])) {
#pragma unroll
    for (int k = 0; k < K; ++k) weight[k] = widen(static_cast<const T*>(weights)[channel * K + k]);
  }
};

// The row step of a quad: bias_row and what the taps see; zeros in rows outside of the image, where the column step
// does not see bias_row.
template <typename T, int K, int kHalo>
__device__ Quad<float> row_step(const Taps<T, K>& taps, const Window<kHalo>& x, bool is_inside) {
  Quad<float> r;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    float sum = taps.bias;
#pragma unroll
    for (int k = 0; k < K; ++k) sum += taps.weight[k] * x[v + k - K / 2];
    r.value[v] = is_inside ? sum : 0;
  }
  return r;
}

// function(T of the dtype, an integral_constant K)
template <typename Function>
void with_taps(const seemore::StripedConv& conv, Function function) {
  with_narrow_type(conv.dtype, [&](auto zero) {
    if (conv.taps == 3) return function(zero, std::integral_constant<int, 3>());
    if (conv.taps == 7) return function(zero, std::integral_constant<int, 7>());
    return function(zero, std::integral_constant<int, 11>());
  });
}

inline size_t bytes_of(seemore::DType dtype) { return dtype == seemore::DType::float32 ? 4 : 2; }
