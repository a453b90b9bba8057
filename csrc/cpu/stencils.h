// 3x3 stencils of R lines at once: every vector is loaded once for R results.
#pragma once

#include "rows.h"

namespace seemore::SEEMORE_ISA {

// out[r][i] = bias + sum_{j, k} weight[3 j + k] * rows[r + j][i + k], begin <= i < begin + length
template <int R, class A>
inline void stencil_3x3(A* const* out, A* const* rows, const Taps<A>& taps, int64_t begin, int64_t length) {
  Vec<A> weight[9];
  for (int k = 0; k < 9; ++k) weight[k] = broadcast(taps.weight[k]);
  for (int64_t i = begin; i < begin + length; i += kLanes<A>) {
    Vec<A> sum[R];
    for (int r = 0; r < R; ++r) sum[r] = broadcast(taps.bias);
#pragma GCC unroll 16
    for (int j = 0; j < R + 2; ++j) {
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        const Vec<A> v = load(rows[j] + i + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (j - r >= 0 && j - r < 3) sum[r] += weight[3 * (j - r) + k] * v;
        }
      }
    }
    for (int r = 0; r < R; ++r) store(out[r] + i, sum[r]);
  }
}

// sum[3 j + k] += sum_{r, i} dy[r][i] * rows[r + j][i + k], and sum[9] += sum_{r, i} dy[r][i]: the gradients of
// weights and bias.
template <int R, class A>
inline void stencil_3x3_gradients(Vec<A>* sum, const A* const* dy, A* const* rows, int64_t begin, int64_t length) {
  Vec<A> local[10];
  for (int k = 0; k < 10; ++k) local[k] = sum[k];
  for (int64_t i = begin; i < begin + length; i += kLanes<A>) {
    Vec<A> d[R];
    for (int r = 0; r < R; ++r) {
      d[r] = load(dy[r] + i);
      local[9] += d[r];
    }
#pragma GCC unroll 16
    for (int j = 0; j < R + 2; ++j) {
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        const Vec<A> v = load(rows[j] + i + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (j - r >= 0 && j - r < 3) local[3 * (j - r) + k] += d[r] * v;
        }
      }
    }
  }
  for (int k = 0; k < 10; ++k) sum[k] = local[k];
}

}  // namespace seemore::SEEMORE_ISA
