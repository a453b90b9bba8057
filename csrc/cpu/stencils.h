// 3x3 stencils of R lines at once: every vector is loaded, and shifted by a column either way, once for R results.
#pragma once

#include "neighbours.h"

namespace seemore::SEEMORE_ISA {

// each(j, k, v): what the taps of column k see of row j's vector at i.
template <int count, class A, class Each>
inline void each_seen(const Line<A> (&lines)[count], int64_t i, int64_t length, const Each& each) {
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) {
    const A* const x = lines[j].x + i;
    const Around<A> around{i > 0 ? load(x - kLanes<A>) : lines[j].left, load(x),
                           i + kLanes<A> < length ? load(x + kLanes<A>) : lines[j].right};
    each(j, 0, around.template at<-1>());
    each(j, 1, around.here);
    each(j, 2, around.template at<1>());
  }
}

// done(i, sums): sums[r] = bias + sum_{j, k} weight[3 j + k] * lines[r + j][i + k - 1]
template <int R, class A, class Done>
inline void stencil_3x3(const Line<A> (&lines)[R + 2], const Taps<A>& taps, int64_t length, const Done& done) {
  Vec<A> weight[9];
  for (int k = 0; k < 9; ++k) weight[k] = broadcast(taps.weight[k]);
  for (int64_t i = 0; i < length; i += kLanes<A>) {
    Vec<A> sums[R];
    for (int r = 0; r < R; ++r) sums[r] = broadcast(taps.bias);
    each_seen(lines, i, length, [&](int j, int k, Vec<A> v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (j - r >= 0 && j - r < 3) sums[r] += weight[3 * (j - r) + k] * v;
      }
    });
    done(i, sums);
  }
}

// sum[3 j + k] += sum_{r, i} dy[r][i] * lines[r + j][i + k - 1], and sum[9] += sum_{r, i} dy[r][i]: the gradients of
// weights and bias.
template <int R, class A>
inline void stencil_3x3_gradients(Vec<A>* sum, const A* const* dy, const Line<A> (&lines)[R + 2], int64_t length) {
  Vec<A> local[10];
  for (int k = 0; k < 10; ++k) local[k] = sum[k];
  for (int64_t i = 0; i < length; i += kLanes<A>) {
    Vec<A> d[R];
    for (int r = 0; r < R; ++r) {
      d[r] = load(dy[r] + i);
      local[9] += d[r];
    }
    each_seen(lines, i, length, [&](int j, int k, Vec<A> v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (j - r >= 0 && j - r < 3) local[3 * (j - r) + k] += d[r] * v;
      }
    });
  }
  for (int k = 0; k < 10; ++k) sum[k] = local[k];
}

}  // namespace seemore::SEEMORE_ISA
