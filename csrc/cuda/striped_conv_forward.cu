// striped_conv's forward for K = 3, 7, 11: y = gate * activation(column(row(x) + bias_row) + bias_col), in one walk.
//
// Every row of x gives a row of r = row(x) + bias_row, which at once goes into the K rows of s = column(r) that see it:
// a lane holds the partial sums of K - 1 of them for its quad. So x is read and y is written once, nothing else.

#include "striped_conv_walk.h"

namespace {

using seemore::Activation;
using seemore::Image;
using seemore::StripedConv;

// On a multiprocessor, at least: what the registers suffice for, 168 each if 12.
template <int K>
constexpr int kWarps = K == 3   ? 20
                       : K == 7 ? 15
                                : 12;

template <typename T, int K, bool kAligned>
__global__ void __launch_bounds__(kThreads, (kAligned ? kWarps<K> : kUnalignedWarps) / kBlockWarps)
    striped_conv_walk_forward(StripedConv conv, Image y_image, Walk walk) {
  constexpr int kRows = 4, kHalf = K / 2, kHalo = kHaloQuads<K>;
  __shared__ Stage<kRows, kHalo> stages[kBlockWarps];
  auto& stage = stages[threadIdx.y];
  const Strip strip(walk, conv.size);
  const int place = Stage<kRows, kHalo>::place(strip, walk.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - walk.lead, steps = walk.lead + walk.rows + kHalf;
  Feed<T, kAligned, kRows, kHalo> x(conv.x, strip, walk, first, kHalf);
  Cursor<const T, kAligned> gate(conv.gate, strip, first - kHalf);
  Cursor<T, kAligned> y(y_image, strip, first - kHalf);
  float partial[K - 1][kQuad];  // partial[m] of the row m further down than the next one of s
#pragma unroll
  for (auto& quad : partial) {
#pragma unroll
    for (float& s : quad) s = col.bias;
  }
  x.take();
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    x.put(stage, half);
    __syncwarp();
    x.take();
    Quad<T> gates[kRows];
    if (conv.gate.data) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) gates[r] = gate.take(strip.has(first + step + r - kHalf));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      const Window<kHalo> seen(stage.row(half, r) + place);
      const Quad<float> line = row_step(row, seen, i >= 0 && i < strip.height);
      Quad<float> result;
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        const float s = partial[0][v] + col.weight[K - 1] * line.value[v];
#pragma unroll
        for (int m = 0; m < K - 2; ++m) partial[m][v] = partial[m + 1][v] + col.weight[K - 2 - m] * line.value[v];
        partial[K - 2][v] = col.bias + col.weight[0] * line.value[v];
        result.value[v] = s;
      }
      if (conv.activation == Activation::gelu) {
#pragma unroll
        for (float& s : result.value) s = gelu(s);
      }
      if (conv.gate.data) {
#pragma unroll
        for (int v = 0; v < kQuad; ++v) result.value[v] *= widen(gates[r]).value[v];
      }
      y.put(narrow<T>(result), strip.has(i - kHalf));
    }
  }
}

}  // namespace

namespace seemore {

void walk_striped_conv(const StripedConv& conv, const Image& y, void* stream) {
  with_taps(conv, [&](auto zero, auto K) {
    using T = decltype(zero);
    const Walk walk = walk_over(conv.size, kWarps<K>, K / 2);
    if (walk.strips == 0) return;
    with_alignment(are_aligned({conv.x, conv.gate, y}, conv.size.width, sizeof(T)), [&](auto aligned) {
      LAUNCH((striped_conv_walk_forward<T, K, aligned>), walk.grid("striped_conv"), kBlock, 0, stream, conv, y, walk);
    });
  });
}

}  // namespace seemore
