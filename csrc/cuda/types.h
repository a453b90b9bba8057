// The element types of CUDA kernels: float, double, __half, __nv_bfloat16; and activations. Sums are of type
// Accumulation<T>: float, or double for double.
#pragma once

#include <math.h>

#include <type_traits>

#include "launch.h"
#include "views.h"

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <typename T>
using Accumulation = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

template <typename T>
__device__ Accumulation<T> widen(T value) {
  return static_cast<Accumulation<T>>(value);
}

template <typename T>
__device__ T narrow(Accumulation<T> value) {
  return static_cast<T>(value);
}

// function(0 of the type)
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

template <typename A>
__device__ A normal_cdf(A s) {
  return A(0.5) * (1 + erf(s * A(0.70710678118654752440)));
}

template <typename A>
__device__ A gelu(A s) {
  return s * normal_cdf(s);
}

template <typename A>
__device__ A gelu_slope(A s) {
  constexpr A kInverseSqrtTwoPi = 0.39894228040143267794;
  return normal_cdf(s) + s * kInverseSqrtTwoPi * exp(A(-0.5) * s * s);
}

template <typename A>
__device__ A activate(A s, seemore::Activation activation) {
  return activation == seemore::Activation::gelu ? gelu(s) : s;
}

template <typename A>
__device__ A activation_slope(A s, seemore::Activation activation) {
  return activation == seemore::Activation::gelu ? gelu_slope(s) : A(1);
}
