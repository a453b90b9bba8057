// Sums over pixels: the gradients of weights and biases.
#pragma once

#include "cpu/tile/blocks.h"

namespace seemore::SEEMORE_ISA {

// sums[i] = the sum of `parts` rows of `count`, in their order.
template <class A>
inline void add_up(A* sums, const A* partial, int64_t parts, int64_t count) {
  for_each_range(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + i];
      sums[i] = static_cast<A>(sum);
    }
  });
}

// Clear the padding beyond `count` pixels, which enters sums.
template <class A>
inline void clear_tail(const Block<A>& block, int64_t rows, int64_t count) {
  const int64_t end = round_up(count, kLanes<A>);
  for (int64_t r = 0; r < rows && count < end; ++r) std::memset(block[r] + count, 0, (end - count) * sizeof(A));
}

// The first `count` lanes of a vector; the others are 0.
template <class A>
inline Vec<A> first_of(Vec<A> v, int64_t count) {
  for (int64_t i = count; i < kLanes<A>; ++i) v[i] = 0;
  return v;
}

// The sum of a vector's lanes, half onto half.
template <class A>
inline A total(Vec<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof(v));
#pragma GCC unroll 4
  for (int64_t half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

#if defined(__AVX512F__)
// Of every four lanes the first two of a and b in turn, and the last two.
inline Vec<float> low_lanes(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
inline Vec<float> high_lanes(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_unpackhi_ps((__m512)a, (__m512)b);
}
#endif

// to[c] += the total of sum[c]
template <int C, class A>
inline void add_totals(A* to, const Vec<A> (&sum)[C]) {
#if defined(__AVX512F__)
  if constexpr (C == 4 && sizeof(A) == 4) {  // all four together: a vector's lanes go half onto half
    using Half = VectorOf<float, 32>::type;
    const Vec<A> first = low_lanes(sum[0], sum[1]) + high_lanes(sum[0], sum[1]);
    const Vec<A> second = low_lanes(sum[2], sum[3]) + high_lanes(sum[2], sum[3]);
    const Vec<A> quads = (Vec<A>)_mm512_shuffle_ps((__m512)first, (__m512)second, 0x44) +
                         (Vec<A>)_mm512_shuffle_ps((__m512)first, (__m512)second, 0xee);
    const Half halves = __builtin_shufflevector(quads, quads, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(quads, quads, 8, 9, 10, 11, 12, 13, 14, 15);
    const Four four =
        __builtin_shufflevector(halves, halves, 0, 1, 2, 3) + __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
    store_vector(to, load_vector<Four>(to) + four);
    return;
  }
#endif
  for (int c = 0; c < C; ++c) to[c] += total<A>(sum[c]);
}

// Rows of factors, `kSteps` pixels in a vector of them.
template <class A>
struct PlainRow {
  static constexpr int64_t kSteps = kLanes<A>;
  explicit PlainRow(const A* from) : v(load(from)) {}
  void add(Vec<A>& sum, const PlainRow& other) const { sum += v * other.v; }
  Vec<A> v;
};

#if defined(__AVX512BF16__)
struct BFloat16Row {
  static constexpr int64_t kSteps = 32;
  explicit BFloat16Row(const BFloat16* from) { std::memcpy(&v, from, sizeof(v)); }
  void add(Vec<float>& sum, const BFloat16Row& other) const {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, v, other.v);
  }
  __m512bh v;
};

// to[r][i] = from[r][i] rounded, and zeros up to `length`, a multiple of 32
inline void to_bfloat16_rows(BFloat16* to, int64_t length, const float* from, int64_t stride, int64_t rows,
                             int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < length; i += 32) {
      const float* const x = from + r * stride + i;
      const Vec<float> first = load(x), second = i + kLanes<float> < count ? load(x + kLanes<float>) : Vec<float>{};
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
      std::memcpy(to + r * length + i, &both, sizeof(both));
    }
  }
}
#endif

// Never inlined, so that sums stay in registers, as `add_products`.
template <int R, int C, class Row, class A, class T>
__attribute__((noinline)) void outer_tile(A* sums, int64_t sums_stride, const T* a, int64_t a_stride, const T* b,
                                          int64_t b_stride, int64_t length) {
  Vec<A> sum[R][C]{};
  for (int64_t i = 0; i < length; i += Row::kSteps) {
    if constexpr (C == 1) {
      const Row column(b + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) Row(a + r * a_stride + i).add(sum[r][0], column);
    } else {
      const Row c0(b + i), c1(b + b_stride + i), c2(b + (C > 2 ? 2 : 0) * b_stride + i);
      const Row c3(b + (C > 3 ? 3 : 0) * b_stride + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Row row(a + r * a_stride + i);
        row.add(sum[r][0], c0);
        row.add(sum[r][1], c1);
        if constexpr (C > 2) row.add(sum[r][2], c2);
        if constexpr (C > 3) row.add(sum[r][3], c3);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) add_totals<C, A>(sums + r * sums_stride, sum[r]);
}

template <class Row, class A, class T>
inline void add_outer_rows(A* sums, int64_t sums_stride, const T* a, int64_t a_stride, int64_t rows, const T* b,
                           int64_t b_stride, int64_t columns, int64_t length) {
  constexpr int C = kTileVectors;
  const auto some = [&](auto rows_at_once, int64_t r) {
    constexpr int R = decltype(rows_at_once)::value;
    int64_t c = 0;
    for (; c + C <= columns; c += C) {
      outer_tile<R, C, Row, A, T>(sums + r * sums_stride + c, sums_stride, a + r * a_stride, a_stride, b + c * b_stride,
                                  b_stride, length);
    }
    for (; c < columns; ++c) {
      outer_tile<R, 1, Row, A, T>(sums + r * sums_stride + c, sums_stride, a + r * a_stride, a_stride, b + c * b_stride,
                                  b_stride, length);
    }
  };
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) some(Constant<6>(), r);
  for (; r + 2 <= rows; r += 2) some(Constant<2>(), r);
  for (; r < rows; ++r) some(Constant<1>(), r);
}

// sums[r][c] += sum_i a[r][i] * b[c][i], i < length, rounded up to a vector: a weight's gradient. With cells that are
// Pairs, the factors are rounded to bfloat16.
template <class A, class Cell = A>
inline void add_outer(A* sums, int64_t sums_stride, const A* a, int64_t a_stride, int64_t rows, const A* b,
                      int64_t b_stride, int64_t columns, int64_t length) {
  if constexpr (kChannels<Cell> == 1) {
    add_outer_rows<PlainRow<A>>(sums, sums_stride, a, a_stride, rows, b, b_stride, columns, length);
  } else {
#if defined(__AVX512BF16__)
    const int64_t wide = round_up(length, 32);
    const Buffer<BFloat16> factors((rows + columns) * wide);
    BFloat16* const of_b = factors + rows * wide;
    to_bfloat16_rows(factors, wide, a, a_stride, rows, length);
    to_bfloat16_rows(of_b, wide, b, b_stride, columns, length);
    add_outer_rows<BFloat16Row, A, BFloat16>(sums, sums_stride, factors, wide, rows, of_b, wide, columns, wide);
#endif
  }
}

}  // namespace seemore::SEEMORE_ISA
