// The element types of CUDA kernels: float, double, __half, __nv_bfloat16; and activations. Sums are of type
// Accumulation<T>: float, or double for double.
#pragma once

#include <math.h>

#include <type_traits>

#include "cuda/common/launch.h"
#include "params/views.h"

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <typename T>
using Accumulation = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

template <typename T>
__device__ Accumulation<T> to_accum(T value) {
  return static_cast<Accumulation<T>>(value);
}

template <typename T>
__device__ T to_storage(Accumulation<T> value) {
  return static_cast<T>(value);
}

constexpr __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum of the warp's lanes, in each of them.
template <typename A>
__device__ A sum_of_warp(A value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// Call function(0 of the type).
template <typename Function>
void with_type(seemore::DType dtype, Function function) {
  switch (dtype) {
    case seemore::DType::float32:
      return function(float());
    case seemore::DType::float64:
      return function(double());
    case seemore::DType::float16:
      return function(__half());
    case seemore::DType::bfloat16:
      return function(__nv_bfloat16());
  }
}

// 1 / x, within a unit in the last place, where neither is denormal.
__device__ inline float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1 / x;
#endif
}

// 1 / sqrt(x), within 2^-22 of it, where x is not denormal.
__device__ inline float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1 / sqrtf(x);
#endif
}

// 2^x, within 2^-22 of it; 0 where that is denormal.
__device__ inline float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < -126 ? 0 : exp2f(x) * (1 + 0x1p-22f);
#endif
}

__device__ inline double normal_cdf(double s) { return 0.5 * (1 + erf(s * 0.70710678118654752440)); }

// By erf(s / sqrt(2)) / s as a rational function of s^2, as in csrc/cpu/simd/math.h: 17 instructions, where erff and
// the rest are 26, and within 6e-8.
__device__ inline float normal_cdf(float s) {
  const float square = fminf(s * s, 29.3764f);  // erf is 1 from here on
  float p = square * 4.65137902e-08f + 1.27150315e-05f, q = square * 1.21264384e-06f + 7.26336657e-05f;
  p = p * square + 0.000330363371f;
  q = q * square + 0.00186383305f;
  p = p * square + 0.00931170303f;
  q = q * square + 0.028429985f;
  p = p * square + 0.0669297799f;
  q = q * square + 0.250550091f;
  p = p * square + 0.797884464f;
  q = q * square + 1;
  return 0.5f * fmaxf(-1, fminf(1, s * p * reciprocal(q))) + 0.5f;
}

template <typename A>
__device__ A gelu(A s) {
  return s * normal_cdf(s);
}

// By 1 / (1 + 2^(s P(s^2))), as in kernels/activation.py, which takes 9 instructions: within 6e-5 of GELU where s > 0,
// and within 3e-5. (tanh.approx in place of the power and the reciprocal would err by half a unit of float16.)
__device__ inline float short_gelu(float s) {
  const float square = fminf(s * s, 64);  // P is positive up to there
  const float p = (square * 0.000995201504f - 0.10662615f) * square - 2.30134832f;
  return s * reciprocal(power_of_two(s * p) + 1);
}

// GELU for a result of type T.
template <typename T, typename A>
__device__ A gelu_to(A s) {
  if constexpr (sizeof(T) == 2) {
    return short_gelu(s);
  } else {
    return gelu(s);
  }
}

template <typename A>
__device__ A gelu_slope(A s) {
  constexpr A kInverseSqrtTwoPi = 0.39894228040143267794;
  return normal_cdf(s) + s * kInverseSqrtTwoPi * exp(A(-0.5) * s * s);
}
