// Parts of the kernels of striped_conv, for K = 3, 7, 11 in float32, float16 and bfloat16.
#pragma once

#include "cuda/common/sweep.h"
#include "params/striped_conv.h"

namespace seemore {

// Writes (parts, B, C) sums of y, too, as many parts as striped_conv_sum_parts, unless `sums` is null.
void striped_conv_with_sums(const StripedConv& conv, const Image& y, float* sums, void* stream);
int64_t striped_conv_sum_parts(const StripedConv& conv);

}  // namespace seemore

// Warps on a multiprocessor, at least: as many as the registers suffice for, 168 each if 12. Access by single pixels
// takes more of them.
template <int K>
constexpr int kUnalignedWarps = K == 3 ? 12 : 8;

template <int K>
constexpr int kHaloVectors = ceil_div(K / 2, kLaneColumns);

// A channel's taps, in registers, and its bias.
template <typename T, int K>
struct Taps {
  float weight[K], bias;

  __device__ Taps(const void* weights, const void* biases, int64_t channel)
      : bias(to_accum(static_cast<const T*>(biases)[channel])) {
#pragma unroll
    for (int k = 0; k < K; ++k) weight[k] = to_accum(static_cast<const T*>(weights)[channel * K + k]);
  }
};

// The row step of a lane's columns: bias_row and the weighted taps; zeros in rows outside of the image, where the
// column step does not see bias_row.
template <typename T, int K, int kHalo>
__device__ Float4 row_step(const Taps<T, K>& taps, const LaneWindow<kHalo>& x, bool is_inside) {
  Float4 r;
#pragma unroll
  for (int v = 0; v < kLaneColumns; ++v) {
    float sum = taps.bias;
#pragma unroll
    for (int k = 0; k < K; ++k) sum += taps.weight[k] * x[v + k - K / 2];
    r.value[v] = is_inside ? sum : 0;
  }
  return r;
}

// Call function(T of the dtype, an integral_constant K).
template <typename Function>
void with_taps(const seemore::StripedConv& conv, Function function) {
  with_sweep_type(conv.dtype, [&](auto zero) {
    if (conv.taps == 3) return function(zero, std::integral_constant<int, 3>());
    if (conv.taps == 7) return function(zero, std::integral_constant<int, 7>());
    return function(zero, std::integral_constant<int, 11>());
  });
}

inline size_t bytes_of(seemore::DType dtype) { return dtype == seemore::DType::float32 ? 4 : 2; }
