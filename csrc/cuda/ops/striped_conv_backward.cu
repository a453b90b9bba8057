// striped_conv's backward for K = 3, 7, 11, in two walks; s and r = row(x) + bias_row are made again, never stored.
//
// The first makes dgate, ds = dy * gate * activation'(s), and the sums for weight_col and bias_col: a lane keeps the
// last K - 1 rows of r for its quad. ds is stored if it differs from dy. The second makes dr, the column step of ds
// transposed, from which lanes see their neighbours' on a stage: dx is the row step transposed, and what dx's taps see,
// times x, are the sums for weight_row. Strips of the second overlap, for nobody stores dr.
//
// Predicted for an H200, x (1, 36, 480, 640), K = 11, bytes of both walks, not yet run on a GPU; see
// striped_conv.cu. The floor is that of one walk, which would not have the registers.
//
//                     bytes    floor    instructions   to issue   predicted   registers   shared per block
//   float32           221 MB   30.9 us  38 + 47        28 us      60 us       168, 166    5,120 and 10,240 bytes
//   bfloat16          110 MB   15.4 us  41 + 47        29 us      40 us       167, 167
//   bfloat16 gate     221 MB   25.7 us  61 + 47        35 us      60 us       167, 167

#include "cuda/ops/striped_conv_sweep.h"

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

template <int K>
constexpr int kColumnWarps = K == 3 ? 16 : 12;
template <int K, int kVector = kQuad>
constexpr int kRowWarps = K == 3 ? (kVector == kQuad ? 20 : 16) : (K == 7 ? 14 : 12);

template <typename T, int K, int kVector>
__global__ void __launch_bounds__(kThreads, (kVector > 1 ? kColumnWarps<K> : kUnalignedWarps<K>) / kBlockWarps)
    striped_conv_walk_backward_column(StripedConv conv, StripedConvGradients gradients, Image ds_image, Parts parts,
                                      Walk walk) {
  constexpr int kRows = 2, kHalf = K / 2, kHalo = kHaloQuads<K>;
  __shared__ Stage<kRows, kHalo> stages[kBlockWarps];
  auto& stage = stages[threadIdx.y];
  const Strip strip(walk, conv.size);
  const int place = Stage<kRows, kHalo>::place(strip, walk.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - walk.lead, steps = walk.lead + walk.rows + kHalf;
  const bool needs_s = conv.gate.data != nullptr || conv.activation != Activation::none;
  Feed<T, kVector, kRows, kHalo> x(conv.x, strip, walk, first, kHalf);
  Cursor<const T, kVector> gate(conv.gate, strip, first - kHalf), dy(gradients.dy, strip, first - kHalf);
  Cursor<T, kVector> dgate(gradients.dgate, strip, first - kHalf);
  Cursor<float, kVector> ds(ds_image, strip, first - kHalf);
  float window[K - 1 + kRows][kQuad] = {};  // rows of r
  float sums[K + 1] = {};
  x.take();
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    x.put(stage, half);
    __syncwarp();
    x.take();
    Words<T, kQuad> dys[kRows], gates[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_mine = strip.has(first + step + r - kHalf);
      dys[r] = dy.take(is_mine);
      gates[r] = gate.take(is_mine && conv.gate.data);
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
        Quad<float> s, slope;
#pragma unroll
        for (int v = 0; v < kQuad; ++v) {
          s.value[v] = col.bias;
          slope.value[v] = is_mine ? 1 : 0;
#pragma unroll
          for (int k = 0; k < K; ++k) s.value[v] += col.weight[k] * window[r + k][v];
        }
        if (conv.activation == Activation::gelu && is_mine) {
#pragma unroll
          for (int v = 0; v < kQuad; ++v) {
            slope.value[v] = gelu_slope(s.value[v]);
            s.value[v] = gelu(s.value[v]);
          }
        }
        if (conv.gate.data) {
#pragma unroll
          for (int v = 0; v < kQuad; ++v) {
            s.value[v] *= gradient.value[v];
            gradient.value[v] *= widen(gates[r]).value[v];
          }
          dgate.put(narrow<T>(s), is_mine);
        }
#pragma unroll
        for (int v = 0; v < kQuad; ++v) gradient.value[v] *= slope.value[v];
        ds.put(narrow<float>(gradient), is_mine);
      }
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] += gradient.value[v] * window[r + k][v];
      }
      sums[K] += sum_of_quad(gradient);
    }
#pragma unroll
    for (int j = 0; j < K - 1; ++j) {
#pragma unroll
      for (int v = 0; v < kQuad; ++v) window[j][v] = window[j + kRows][v];
    }
  }
  store_sums<K>(parts, sums, conv, strip, walk);
}

// What row i of ds is multiplied by in the sum of all dr, weight_row's bias's gradient. (Summing dr itself would sum
// its rounding, too.)
template <typename T, int K>
__device__ float sum_of_taps(const Taps<T, K>& taps, int i, int height) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) sum += i + k >= K / 2 && i + k < height + K / 2 ? taps.weight[k] : 0;
  return sum;
}

// S: the type of ds.
template <typename S, typename T, int K, int kVector>
__global__ void __launch_bounds__(kThreads, (kVector > 1 ? kRowWarps<K, kVector> : kUnalignedWarps<K>) / kBlockWarps)
    striped_conv_walk_backward_row(StripedConv conv, StripedConvGradients gradients, Image ds_image, Parts parts,
                                   Walk walk) {
  constexpr int kRows = 4, kHalf = K / 2, kHalo = kHaloQuads<K>;
  __shared__ Stage<kRows, kHalo> stages[kBlockWarps];
  auto& stage = stages[threadIdx.y];
  const Strip strip(walk, conv.size);
  const int place = Stage<kRows, kHalo>::place(strip, walk.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - walk.lead, steps = walk.lead + walk.rows + kHalf;
  const int end = min(strip.end + kHalf, strip.height);
  Cursor<const S, kVector> ds(ds_image, strip, first);
  Cursor<const T, kVector> x(conv.x, strip, first - kHalf);
  Cursor<T, kVector> dx(gradients.dx, strip, first - kHalf);
  const float all_taps = sum_of_taps(col, kHalf, K);
  float partial[K - 1][kQuad] = {};  // of the rows of dr, as in forward of those of s
  float sums[K + 1] = {};
  for (int i = threadIdx.x; i < 2 * kRows * stage.kPitch; i += kWarp) stage.quads[i] = {};  // beside strips
  __syncwarp();
  Words<S, kQuad> next[kRows];
  const auto take = [&](int step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      next[r] = ds.take(i >= 0 && i < end);
    }
  };
  take(0);
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    Words<T, kQuad> xs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      xs[r] = x.take(strip.writes && strip.has(first + step + r - kHalf));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      const Quad<float> seen = widen(next[r]);
      if (strip.writes && strip.has(i)) {
        const bool is_near_border = i < kHalf || i >= strip.height - kHalf;
        sums[K] += (is_near_border ? sum_of_taps(col, i, strip.height) : all_taps) * sum_of_quad(seen);
      }
      Quad<float> dr;
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        dr.value[v] = partial[0][v] + col.weight[0] * seen.value[v];
#pragma unroll
        for (int m = 0; m < K - 2; ++m) partial[m][v] = partial[m + 1][v] + col.weight[m + 1] * seen.value[v];
        partial[K - 2][v] = col.weight[K - 1] * seen.value[v];
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
      dx.put(narrow<T>(result), strip.writes && strip.has(first + step + r - kHalf));
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
    walks.column = walk_over(conv.size, kColumnWarps<K>, K / 2);
    walks.row = walk_over(conv.size, kRowWarps<K>, K / 2, kQuad * kHaloQuads<K>);
  });
  walks.stores_ds = conv.gate.data != nullptr || conv.activation != Activation::none;
  return walks;
}

}  // namespace

namespace seemore {

StripedConvWorkspace striped_conv_workspace(const StripedConv& conv) {
  const Walks walks = walks_of(conv);
  const Size& size = conv.size;
  return {walks.column.parts(size) + walks.row.parts(size),
          walks.stores_ds ? size.batch * size.channels * size.height * size.width : 0};
}

void striped_conv_backward(const StripedConv& conv, const StripedConvGradients& gradients, void* stream) {
  const Walks walks = walks_of(conv);
  if (walks.column.strips == 0) return;
  const Size& size = conv.size;
  const int64_t plane = size.height * size.width;
  const Image stored{gradients.scratch, size.channels * plane, plane, size.width, 1};
  const Image ds = walks.stores_ds ? stored : gradients.dy;
  const auto images = {conv.x, conv.gate, gradients.dy, gradients.dx, gradients.dgate};
  int vector_size = vector_of(images, size.width, bytes_of(conv.dtype));
  if (walks.stores_ds) vector_size = vector_of({stored}, size.width, sizeof(float), vector_size);
  const int taps = static_cast<int>(conv.taps);
  const Parts column{gradients.partial, 0, taps + 1}, row{gradients.partial, walks.column.parts(size), 0};
  with_taps(conv, [&](auto zero, auto K) {
    using T = decltype(zero);
    with_vector(vector_size, [&](auto vector) {
      const auto walk_rows = [&](auto ds_zero) {
        using S = decltype(ds_zero);
        LAUNCH((striped_conv_walk_backward_row<S, T, K, vector>), walks.row.grid("striped_conv_backward"), kBlock, 0,
               stream, conv, gradients, ds, row, walks.row);
      };
      LAUNCH((striped_conv_walk_backward_column<T, K, vector>), walks.column.grid("striped_conv_backward"), kBlock, 0,
             stream, conv, gradients, ds, column, walks.column);
      walks.stores_ds ? walk_rows(float()) : walk_rows(zero);
    });
  });
}

}  // namespace seemore
