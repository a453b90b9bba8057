// depthwise_gate on CUDA: y = u * (depthwise_3x3(g) + bias), and its gradients, a walk each.
//
// Every row of g goes into the three rows of s = depthwise_3x3(g) + bias that see it; a lane holds the partial sums of
// two of them for its quad. Backward makes s once more for du, and takes dc = dy * u, the gradient of s, through the
// transposed stencil; both walks read and write every image once.
//
// Predicted for an H200, images (1, 36, 480, 640), not yet run on a GPU; see striped_conv_forward.cu:
//
//                        bytes    floor    instructions   to issue   predicted   registers   shared per block
//   forward float32      133 MB   30.9 us  19 a pixel     6.6 us     34 us        95         9,216 bytes
//   forward bfloat16      66 MB   15.4 us  22             7.6 us     17 us        80         9,216
//   backward float32     221 MB   51.4 us  51             18 us      57 us       156         9,216
//   backward bfloat16    111 MB   25.7 us  54             19 us      29 us       147         9,216

#include "depthwise_gate.h"
#include "walk.h"

namespace {

using seemore::DepthwiseGate;
using seemore::DepthwiseGateGradients;
using seemore::Image;

// Warps on a multiprocessor, at least: what the registers suffice for.
constexpr int kForwardWarps = 20, kBackwardWarps = 12;
constexpr int kUnalignedForwardWarps = 12, kUnalignedBackwardWarps = 8;

// A channel's 3x3 weights, in registers, and its bias.
template <typename T>
struct Stencil {
  float weight[3][3], bias;

  __device__ Stencil(const DepthwiseGate& inputs, int64_t channel)
      : bias(widen(static_cast<const T*>(inputs.bias)[channel])) {
#pragma unroll
    for (int i = 0; i < 9; ++i) weight[i / 3][i % 3] = widen(static_cast<const T*>(inputs.weight)[channel * 9 + i]);
  }
};

// `sum` and what one row of weights sees around column v: one to the left, v, one to the right; or, with kStep = -1,
// the other way round.
template <int kStep>
__device__ float add_row(float sum, const float (&weight)[3], const Window<1>& seen, int v) {
#pragma unroll
  for (int j = 0; j < 3; ++j) sum += weight[j] * seen[v + kStep * (j - 1)];
  return sum;
}

// A row of s: goes on from the partial sums of the row and of the next one, given what is seen one row further down.
template <typename T>
__device__ Quad<float> next_row(float (&partial)[2][kQuad], const Stencil<T>& stencil, const Window<1>& seen) {
  Quad<float> s;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    s.value[v] = add_row<1>(partial[0][v], stencil.weight[2], seen, v);
    partial[0][v] = add_row<1>(partial[1][v], stencil.weight[1], seen, v);
    partial[1][v] = add_row<1>(stencil.bias, stencil.weight[0], seen, v);
  }
  return s;
}

template <typename T>
__device__ void start(float (&partial)[2][kQuad], const Stencil<T>& stencil) {
#pragma unroll
  for (int v = 0; v < kQuad; ++v) partial[0][v] = partial[1][v] = stencil.bias;
}

// The same transposed, without bias: a row of dg.
template <typename T>
__device__ Quad<float> next_row_transposed(float (&partial)[2][kQuad], const Stencil<T>& stencil,
                                           const Window<1>& seen) {
  Quad<float> dg;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    dg.value[v] = add_row<-1>(partial[0][v], stencil.weight[0], seen, v);
    partial[0][v] = add_row<-1>(partial[1][v], stencil.weight[1], seen, v);
    partial[1][v] = add_row<-1>(0, stencil.weight[2], seen, v);
  }
  return dg;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, (kVector > 1 ? kForwardWarps : kUnalignedForwardWarps) / kBlockWarps)
    depthwise_gate_forward(DepthwiseGate inputs, Image y_image, Walk walk) {
  constexpr int kRows = 4;
  __shared__ Stage<kRows, 1> stages[kBlockWarps];
  auto& stage = stages[threadIdx.y];
  const Strip strip(walk, inputs.size);
  const int place = Stage<kRows, 1>::place(strip, walk.lanes);
  const Stencil<T> stencil(inputs, strip.channel);
  const int first = strip.row - walk.lead, steps = walk.lead + walk.rows + 1;
  Feed<T, kVector, kRows, 1> g(inputs.g, strip, walk, first, 1);
  Cursor<const T, kVector> u(inputs.u, strip, first - 1);
  Cursor<T, kVector> y(y_image, strip, first - 1);
  float partial[2][kQuad];
  start(partial, stencil);
  g.take();
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    g.put(stage, half);
    __syncwarp();
    g.take();
    Words<T, kQuad> us[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) us[r] = u.take(strip.has(first + step + r - 1));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Quad<float> s = next_row(partial, stencil, Window<1>(stage.row(half, r) + place));
      y.put(narrow<T>(product(widen(us[r]), s)), strip.has(first + step + r - 1));
    }
  }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, (kVector > 1 ? kBackwardWarps : kUnalignedBackwardWarps) / kBlockWarps)
    depthwise_gate_backward(DepthwiseGate inputs, DepthwiseGateGradients gradients, Walk walk) {
  constexpr int kRows = 2;
  __shared__ Stage<kRows, 1> g_stages[kBlockWarps], dc_stages[kBlockWarps];
  auto &g_stage = g_stages[threadIdx.y], &dc_stage = dc_stages[threadIdx.y];
  const Strip strip(walk, inputs.size);
  const int place = Stage<kRows, 1>::place(strip, walk.lanes);
  const Stencil<T> stencil(inputs, strip.channel);
  const int first = strip.row - walk.lead, steps = walk.lead + walk.rows + 1;
  Feed<T, kVector, kRows, 1> g(inputs.g, strip, walk, first, 1), u(inputs.u, strip, walk, first, 1);
  Feed<T, kVector, kRows, 1> dy(gradients.dy, strip, walk, first, 1);
  Cursor<T, kVector> du(gradients.du, strip, first - 1), dg(gradients.dg, strip, first - 1);
  float s_partial[2][kQuad], dg_partial[2][kQuad] = {}, sums[3][3] = {}, bias_sum = 0;
  start(s_partial, stencil);
  Quad<float> last_dy = {}, last_dc = {};  // of the row above
  float last_g[kQuad + 2] = {};            // likewise, one column further to both sides
  g.take(), u.take(), dy.take();
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    g.put(g_stage, half);
    dy.put_product(u, dc_stage, half);
    __syncwarp();
    Words<T, kQuad> dys[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) dys[r] = dy.rows[r];
    g.take(), u.take(), dy.take();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      const Window<1> g_seen(g_stage.row(half, r) + place), dc_seen(dc_stage.row(half, r) + place);
      du.put(narrow<T>(product(last_dy, next_row(s_partial, stencil, g_seen))), strip.has(i - 1));
      dg.put(narrow<T>(next_row_transposed(dg_partial, stencil, dc_seen)), strip.has(i - 1));
      last_dy = widen(dys[r]);
      Quad<float> dc;
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        dc.value[v] = strip.has(i) ? dc_seen[v] : 0;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          sums[0][j] += dc.value[v] * last_g[v + j];
          sums[1][j] += dc.value[v] * g_seen[v + j - 1];
          sums[2][j] += last_dc.value[v] * g_seen[v + j - 1];
        }
      }
      bias_sum += sum_of_quad(dc);
      last_dc = dc;
#pragma unroll
      for (int v = 0; v < kQuad + 2; ++v) last_g[v] = g_seen[v - 1];
    }
  }
  float* const to = static_cast<float*>(gradients.partial) + (strip.part * inputs.size.channels + strip.channel) * 10;
  const bool stores = strip.lane == 0 && strip.end > strip.row;
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const float sum = sum_of_strip(i < 9 ? sums[i / 3][i % 3] : bias_sum, walk);
    if (stores) to[i] = sum;
  }
}

}  // namespace

namespace seemore {

void depthwise_gate(const DepthwiseGate& inputs, const Image& y, void* stream) {
  const Walk walk = walk_over(inputs.size, kForwardWarps, 1, 0, multiprocessors());
  if (walk.strips == 0) return;
  with_narrow_type(inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_vector(vector_of({inputs.u, inputs.g, y}, inputs.size.width, sizeof(T)), [&](auto vector) {
      LAUNCH((depthwise_gate_forward<T, vector>), walk.grid("depthwise_gate"), kBlock, 0, stream, inputs, y, walk);
    });
  });
}

int64_t depthwise_gate_parts(const DepthwiseGate& inputs) {
  return walk_over(inputs.size, kBackwardWarps, 1).parts(inputs.size);
}

void depthwise_gate_backward(const DepthwiseGate& inputs, const DepthwiseGateGradients& gradients, void* stream) {
  const Walk walk = walk_over(inputs.size, kBackwardWarps, 1);
  if (walk.strips == 0) return;
  const auto images = {inputs.u, inputs.g, gradients.dy, gradients.du, gradients.dg};
  with_narrow_type(inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_vector(vector_of(images, inputs.size.width, sizeof(T)), [&](auto vector) {
      LAUNCH((::depthwise_gate_backward<T, vector>), walk.grid("depthwise_gate_backward"), kBlock, 0, stream, inputs,
             gradients, walk);
    });
  });
}

}  // namespace seemore
