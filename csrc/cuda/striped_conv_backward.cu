// striped_conv's backward for K = 3, 7, 11, in two walks; s and r = row(x) + bias_row are made again, never stored.
//
// The first makes dgate, ds = dy * gate * activation'(s), and the sums for weight_col and bias_col: a lane keeps the
// last K - 1 rows of r for its quad. ds is stored if it differs from dy. The second makes dr, the column step of ds
// transposed, from which lanes see their neighbours' on a stage: dx is the row step transposed, and what dx's taps see,
// times x, are the sums for weight_row. Strips of the second overlap, for nobody stores dr.

#include "striped_conv_walk.h"

namespace {

using seemore::Activation;
using seemore::Image;
using seemore::StripedConv;
using seemore::StripedConvGradients;

// Where the walks' sums are among the partial ones: a walk's parts come after those of the one before, and are 0 in the
// other one's columns.
struct Parts {
  void* partial;
  int64_t first;
  int column;  // of its K + 1
};

template <int K>
__device__ void store_sums(const Parts& parts, float (&sums)[K + 1], const StripedConv& conv, const Strip& strip,
                           const Walk& walk) {
#pragma unroll
  for (int k = 0; k <= K; ++k) sums[k] = sum_of_strip(sums[k], walk);
  if (strip.lane > 0 || strip.end == strip.row) return;
  const int64_t place = ((parts.first + strip.part) * conv.size.channels + strip.channel) * (2 * K + 2);
  float* const to = static_cast<float*>(parts.partial) + place;
#pragma unroll
  for (int k = 0; k <= K; ++k) {
    to[parts.column + k] = sums[k];
    to[K + 1 - parts.column + k] = 0;
  }
}

template <typename T, int K>
__global__ void __launch_bounds__(kWarp, kWarps<K>)
    striped_conv_walk_backward_column(StripedConv conv, StripedConvGradients gradients, Image ds_image, Parts parts,
                                      Walk walk) {
  constexpr int kRows = 2, kHalf = K / 2, kHalo = kHaloQuads<K>;
  __shared__ Stage<kRows, kHalo> stage;
  const Strip strip(walk, conv.size);
  const int place = Stage<kRows, kHalo>::place(strip, walk.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - walk.lead, steps = walk.lead + walk.rows + kHalf;
  const bool needs_s = conv.gate.data != nullptr || conv.activation != Activation::none;
  Feed<T, kRows, kHalo> x(conv.x, strip, walk, first, kHalf);
  Cursor<const T> gate(conv.gate, strip, first - kHalf), dy(gradients.dy, strip, first - kHalf);
  Cursor<T> dgate(gradients.dgate, strip, first - kHalf);
  Cursor<float> ds(ds_image, strip, first - kHalf);
  float window[K - 1 + kRows][kQuad] = {};  // rows of r
  float sums[K + 1] = {};
  x.take();
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    x.put(stage, half);
    __syncwarp();
    x.take();
    Quad<T> dys[kRows], gates[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_mine = strip.has(first + step + r - kHalf);
      dys[r] = dy.take(is_mine, walk.is_aligned);
      if (conv.gate.data) gates[r] = gate.take(is_mine, walk.is_aligned);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      const Window<kHalo> seen(stage.row(half, r) + place);
      const Quad<float> line = row_step(row, seen, i >= 0 && i < strip.height);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) window[K - 1 + r][v] = line.value[v];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_mine = strip.has(first + step + r - kHalf);
      Quad<float> gradient = widen(dys[r]);
      if (needs_s) {
        Quad<float> gate_gradient;
#pragma unroll
        for (int v = 0; v < kQuad; ++v) {
          float s = col.bias;
#pragma unroll
          for (int k = 0; k < K; ++k) s += col.weight[k] * window[r + k][v];
          gate_gradient.value[v] = gradient.value[v] * activate(s, conv.activation);
          if (conv.gate.data) gradient.value[v] *= widen(gates[r].value[v]);
          gradient.value[v] = is_mine ? gradient.value[v] * activation_slope(s, conv.activation) : 0;
        }
        if (conv.gate.data) dgate.put(narrow<T>(gate_gradient), is_mine, walk.is_aligned);
        ds.put(gradient, is_mine, walk.is_aligned);
      }
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] += gradient.value[v] * window[r + k][v];
        sums[K] += gradient.value[v];
      }
    }
#pragma unroll
    for (int j = 0; j < K - 1; ++j) {
#pragma unroll
      for (int v = 0; v < kQuad; ++v) window[j][v] = window[j + kRows][v];
    }
  }
  store_sums<K>(parts, sums, conv, strip, walk);
}

// S: the type of ds.
template <typename S, typename T, int K>
__global__ void __launch_bounds__(kWarp, kWarps<K>)
    striped_conv_walk_backward_row(StripedConv conv, StripedConvGradients gradients, Image ds_image, Parts parts,
                                   Walk walk) {
  constexpr int kRows = 4, kHalf = K / 2, kHalo = kHaloQuads<K>;
  __shared__ Stage<kRows, kHalo> stage;
  const Strip strip(walk, conv.size);
  const int place = Stage<kRows, kHalo>::place(strip, walk.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - walk.lead, steps = walk.lead + walk.rows + kHalf;
  const int end = min(strip.end + kHalf, strip.height);
  Cursor<const S> ds(ds_image, strip, first);
  Cursor<const T> x(conv.x, strip, first - kHalf);
  Cursor<T> dx(gradients.dx, strip, first - kHalf);
  float partial[K - 1][kQuad] = {};  // of the rows of dr, as in forward of those of s
  float sums[K + 1] = {};
  for (int i = threadIdx.x; i < 2 * kRows * stage.kPitch; i += kWarp) stage.quads[i] = {};  // beside strips
  __syncwarp();
  Quad<S> next[kRows];
  const auto take = [&](int step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      next[r] = ds.take(i >= 0 && i < end, walk.is_aligned);
    }
  };
  take(0);
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    Quad<T> xs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      xs[r] = x.take(strip.writes && strip.has(first + step + r - kHalf), walk.is_aligned);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Quad<float> seen = widen(next[r]);
      Quad<float> dr;
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        dr.value[v] = partial[0][v] + col.weight[0] * seen.value[v];
#pragma unroll
        for (int m = 0; m < K - 2; ++m) partial[m][v] = partial[m + 1][v] + col.weight[m + 1] * seen.value[v];
        partial[K - 2][v] = col.weight[K - 1] * seen.value[v];
        if (strip.writes && strip.has(first + step + r - kHalf)) sums[K] += dr.value[v];
      }
      stage.row(half, r)[place] = dr;
    }
    __syncwarp();
    take(step + kRows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Window<kHalo> dr(stage.row(half, r) + place);
      const Quad<float> seen = widen(xs[r]);
      Quad<float> result;
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        result.value[v] = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          result.value[v] += row.weight[k] * dr[v + kHalf - k];
          sums[k] += seen.value[v] * dr[v + kHalf - k];
        }
      }
      dx.put(narrow<T>(result), strip.writes && strip.has(first + step + r - kHalf), walk.is_aligned);
    }
  }
  store_sums<K>(parts, sums, conv, strip, walk);
}

struct Walks {
  Walk column, row;
  bool stores_ds;
};

Walks walks_of(const StripedConv& conv) {
  Walks walks;
  with_taps(conv, [&](auto, auto K) {
    walks.column = walk_over(conv.size, kWarps<K>, K / 2);
    walks.row = walk_over(conv.size, kWarps<K>, K / 2, kQuad * kHaloQuads<K>);
  });
  walks.stores_ds = conv.gate.data != nullptr || conv.activation != Activation::none;
  return walks;
}

}  // namespace

namespace seemore {

StripedConvWorkspace walk_striped_conv_workspace(const StripedConv& conv) {
  const Walks walks = walks_of(conv);
  const Size& size = conv.size;
  return {walks.column.parts(size) + walks.row.parts(size),
          walks.stores_ds ? size.batch * size.channels * size.height * size.width : 0};
}

void walk_striped_conv_backward(const StripedConv& conv, const StripedConvGradients& gradients, void* stream) {
  Walks walks = walks_of(conv);
  if (walks.column.strips == 0) return;
  const Size& size = conv.size;
  const int64_t plane = size.height * size.width;
  const Image stored{gradients.scratch, size.channels * plane, plane, size.width, 1};
  const Image ds = walks.stores_ds ? stored : gradients.dy;
  walks.column.is_aligned = walks.row.is_aligned =
      are_aligned({conv.x, conv.gate, gradients.dy, gradients.dx, gradients.dgate}, size.width, bytes_of(conv.dtype)) &&
      (!walks.stores_ds || are_aligned({stored}, size.width, sizeof(float)));
  const int taps = static_cast<int>(conv.taps);
  const Parts column{gradients.partial, 0, taps + 1}, row{gradients.partial, walks.column.parts(size), 0};
  with_taps(conv, [&](auto zero, auto K) {
    using T = decltype(zero);
    const auto walk_rows = [&](auto ds_zero) {
      using S = decltype(ds_zero);
      LAUNCH((striped_conv_walk_backward_row<S, T, K>), walks.row.grid("striped_conv_backward"), kWarp, 0, stream, conv,
             gradients, ds, row, walks.row);
    };
    LAUNCH((striped_conv_walk_backward_column<T, K>), walks.column.grid("striped_conv_backward"), kWarp, 0, stream, conv,
           gradients, ds, column, walks.column);
    walks.stores_ds ? walk_rows(float()) : walk_rows(zero);
  });
}

}  // namespace seemore
