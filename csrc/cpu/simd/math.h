// The exponential function, GELU and its derivative, of vectors.
#pragma once

#include <cmath>

#include "cpu/simd/vec.h"

namespace seemore::SEEMORE_ISA {

// GELU(x) = x * Phi(x) and its derivative Phi(x) + x * phi(x), Phi and phi the normal distribution and its density.

template <class A>
struct Normal {
  Vec<A> distribution, density;
};

// exp(x) for x <= 0; relative error below 1e-7, 0 below -87.
__attribute__((always_inline)) inline Vec<float> exp_of_negative(Vec<float> x) {
  const Vec<float> bounded = x < -87.f ? Vec<float>{} - 87.f : x;  // NaN stays
  // n = round(x / ln 2): adding 1.5 * 2^23 leaves the integer in the low bits of the mantissa.
  const Vec<float> shifted = bounded * 1.44269504f + 12582912.f;
  const Vec<float> n = shifted - 12582912.f;
  const Vec<float> r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Vec<uint32_t> power = bit_cast<Vec<uint32_t>>(shifted) << 23;  // n into the exponent
  const Vec<float> e = bit_cast<Vec<float>>(bit_cast<Vec<uint32_t>>(p) + power);
  return x < -87.f ? Vec<float>{} : e;
}

// a / b where neither b nor its reciprocal overflows; within 2 units in the last place.
inline Vec<float> divide(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  // Dividing takes longer than all the rest of GELU there: 14 bits of the reciprocal, doubled by a step of Newton's.
  const Vec<float> reciprocal = (Vec<float>)_mm512_rcp14_ps((__m512)b);
  return a * (reciprocal * (2.f - b * reciprocal));
#else
  return a / b;
#endif
}

// 1 - Phi(|x|) = exp(-x^2 / 2) * t * q(t), t = 1 / (1 + 0.35 |x|): q is the polynomial of least relative error, 3.2e-8,
// on 0 <= |x| <= 14, fitted by iterated reweighting; beyond, the exponential is 0.
__attribute__((always_inline)) inline Normal<float> normal(Vec<float> x) {
  const Vec<float> e = exp_of_negative(x * x * -0.5f);
  const Vec<float> t = divide(broadcast(1.f), 1.f + 0.35f * smaller(broadcast(14.f), x < 0.f ? -x : x));
  Vec<float> q = t * -0.0291459273f + 0.143971683f;
  q = q * t - 0.255714224f;
  q = q * t + 0.159174125f;
  q = q * t - 0.0231098115f;
  q = q * t + 0.105507994f;
  q = q * t + 0.11983287f;
  q = q * t + 0.139861869f;
  q = q * t + 0.139621404f;
  const Vec<float> beyond = e * (q * t);
  return {x > 0.f ? 1.f - beyond : beyond, e * 0.398942280f};
}

inline Normal<double> normal(Vec<double> x) {
  Normal<double> result;
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    result.distribution[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
    result.density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
  }
  return result;
}

template <class A>
inline Vec<A> gelu(Vec<A> x) {
  return x * normal(x).distribution;
}

// x / 2 * (1 + erf(x / sqrt(2))), with erf(x / sqrt(2)) / x a rational function of x^2: of least absolute error of erf,
// 1.2e-8, for |x| <= 5.42, where erf is 1 in float32; fitted by iterated reweighting.
template <>
__attribute__((always_inline)) inline Vec<float> gelu<float>(Vec<float> x) {
  const Vec<float> square = x * x;
  const Vec<float> s = smaller(square, broadcast(29.3764f));
  Vec<float> p = s * 4.65137902e-08f + 1.27150315e-05f;
  Vec<float> q = s * 1.21264384e-06f + 7.26336657e-05f;
  p = p * s + 0.000330363371f;
  q = q * s + 0.00186383305f;
  p = p * s + 0.00931170303f;
  q = q * s + 0.028429985f;
  p = p * s + 0.0669297799f;
  q = q * s + 0.250550091f;
  p = p * s + 0.797884464f;
  q = q * s + 1.f;
  // The bound comes first: NaN passes through.
  const Vec<float> e = larger(broadcast(-1.f), smaller(broadcast(1.f), divide(x * p, q)));
  const Vec<float> half = 0.5f * x;
  return half * e + half;
}

// GELU of what is rounded to 16 bits: erf within 2.3e-4, and exactly -1 or 1 from |x| = 4 on.
__attribute__((always_inline)) inline Vec<float> gelu_to_16_bits(Vec<float> x) {
  // The bound comes first: NaN passes through.
  const Vec<float> bounded = larger(broadcast(-4.f), smaller(broadcast(4.f), x));
  const Vec<float> s = bounded * bounded;
  Vec<float> p = s * 0.00570371f + 0.19774508f;
  Vec<float> q = s * 0.05498335f + 0.40969681f;
  p = p * s + 0.79680032f;
  q = q * s + 1.f;
#if defined(__AVX512F__)
  const Vec<float> e = bounded * p * (Vec<float>)_mm512_rcp14_ps((__m512)q);
#else
  const Vec<float> e = bounded * p / q;
#endif
  const Vec<float> half = 0.5f * x;
  return half * smaller(broadcast(1.f), larger(broadcast(-1.f), e)) + half;
}

// Both at once.
template <class A>
struct GeluBoth {
  Vec<A> value, gradient;
};

template <class A>
__attribute__((always_inline)) inline GeluBoth<A> gelu_both(Vec<A> x) {
  const Normal<A> n = normal(x);
  return {x * n.distribution, n.distribution + x * n.density};
}

// GELU'(x)
template <class A>
inline Vec<A> gelu_gradient(Vec<A> x) {
  const Normal<A> n = normal(x);
  return n.distribution + x * n.density;
}

// GELU'(x) = Phi(x) + x phi(x) = 1/2 + x * (a rational function of x^2): of least absolute error, 4e-09, for |x| <= 6,
// beyond which it is within 4e-8 of 0 or 1; fitted by iterated reweighting.
template <>
__attribute__((always_inline)) inline Vec<float> gelu_gradient<float>(Vec<float> x) {
  // The bound comes first: NaN passes through.
  const Vec<float> bounded = larger(broadcast(-6.f), smaller(broadcast(6.f), x));
  const Vec<float> s = bounded * bounded;
  Vec<float> q = s * 1.3147724e-09f + 3.38980698e-07f;
  Vec<float> p = s * 1.70464265e-08f + 9.22536685e-07f;
  q = q * s + 1.03077637e-05f;
  p = p * s + 3.40919032e-05f;
  q = q * s + 0.000245324773f;
  p = p * s + 0.000202733689f;
  q = q * s + 0.00397151522f;
  p = p * s + 0.0138573349f;
  q = q * s + 0.0441336408f;
  p = p * s - 0.0223711226f;
  q = q * s + 0.305294931f;
  p = p * s + 0.797884524f;
  q = q * s + 1.f;
  return divide(bounded * p, q) + 0.5f;
}

}  // namespace seemore::SEEMORE_ISA
