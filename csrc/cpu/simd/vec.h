// Vectors of the instruction set that this translation unit is compiled for, by the compiler's own vector types.
//
// A source is compiled once per instruction set, in a namespace of its own (SEEMORE_ISA). So that the linker never
// merges a function compiled for a newer one into the rest, such sources use no inline function or template from
// outside this namespace, types aside: no <algorithm>, no <vector>, nothing of torch (tests/test_native.py looks).
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

namespace seemore::SEEMORE_ISA {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <class A, int64_t bytes = kVectorBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);
template <class V>
using LaneIndices = std::make_index_sequence<sizeof(V) / sizeof(V{}[0])>;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// bfloat16 is the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// The type to add up in: float64 for float64, else float32.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateIn<T>::type;

// std::integral_constant and std::remove_pointer of this namespace.
template <int n>
struct Constant {
  static constexpr int value = n;
};
template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // -0 stays -0
}

// Storage to accumulation type and back, one element or a vector V; addresses need no alignment.

template <class V>
struct Half;  // 16-bit and 32-bit integers for every lane of V
template <>
struct Half<Vec<float>> {
  using type = VectorOf<uint16_t, kVectorBytes / 2>::type;
  using bits = Vec<uint32_t>;
};
using Four = VectorOf<float, 16>::type;
#if defined(__AVX2__)
template <>
struct Half<Four> {
  using type = VectorOf<uint16_t, 8>::type;
  using bits = VectorOf<uint32_t, 16>::type;
};
#endif

template <class V, class A>
inline V load_vector(const A* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class V>
inline V load_vector(const BFloat16* from) {
  typename Half<V>::type half;
  std::memcpy(&half, from, sizeof(half));
  return bit_cast<V>(__builtin_convertvector(half, typename Half<V>::bits) << 16);
}

template <class V, class A>
inline void store_vector(A* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

template <class V>
inline void store_vector(BFloat16* to, V v) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(v) == 64) {
    const auto half = (VectorOf<uint16_t, 32>::type)_mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &half, sizeof(half));
    return;
  }
#endif
  using Bits = typename Half<V>::bits;
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const Bits result = (v == v ? rounded : Bits{} + 0x7fc00000u) >> 16;
  const auto half = __builtin_convertvector(result, typename Half<V>::type);
  std::memcpy(to, &half, sizeof(half));
}

template <class T>
inline Vec<Accumulate<T>> load(const T* from) {
  return load_vector<Vec<Accumulate<T>>>(from);
}

template <class T>
inline void store(T* to, Vec<Accumulate<T>> v) {
  store_vector<Vec<Accumulate<T>>>(to, v);
}

// a < b ? a : b and a > b ? a : b: b where one is NaN.
inline Vec<float> smaller(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

inline Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

template <class A>
inline A load_one(const A* from) {
  return *from;
}

inline float load_one(const BFloat16* from) { return bit_cast<float>(uint32_t{from->bits} << 16); }

template <class A>
inline void store_one(A* to, A value) {
  *to = value;
}

inline void store_one(BFloat16* to, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  to->bits = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// to[j][i] = from[i][j], i, j < 4: channels that lie side by side to rows, and back.

inline void transpose(Four (&v)[4]) {
  const Four a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const Four c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5), d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

template <class T>
inline void transpose_load(float* to, int64_t to_stride, const T* from, int64_t from_stride) {
  Four v[4];
  for (int i = 0; i < 4; ++i) v[i] = load_vector<Four>(from + i * from_stride);
  transpose(v);
  for (int i = 0; i < 4; ++i) store_vector(to + i * to_stride, v[i]);
}

template <class T>
inline void transpose_store(T* to, int64_t to_stride, const float* from, int64_t from_stride) {
  Four v[4];
  for (int i = 0; i < 4; ++i) v[i] = load_vector<Four>(from + i * from_stride);
  transpose(v);
  for (int i = 0; i < 4; ++i) store_vector(to + i * to_stride, v[i]);
}

inline void transpose_load(double* to, int64_t to_stride, const double* from, int64_t from_stride) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

inline void transpose_store(double* to, int64_t to_stride, const double* from, int64_t from_stride) {
  transpose_load(to, to_stride, from, from_stride);
}

template <class A>
inline double sum_of_lanes(Vec<A> v) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

}  // namespace seemore::SEEMORE_ISA
