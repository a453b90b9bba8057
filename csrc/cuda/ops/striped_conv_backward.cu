// striped_conv's backward for K = 3, 7, 11, in two sweeps; s and r = row(x) + bias_row are recomputed, never stored.
//
// The first makes dgate, ds = dy * gate * activation'(s), and the sums for weight_col and bias_col: a lane keeps the
// last K - 1 rows of r for its columns. ds is stored if it differs from dy. The second makes dr, the column step of ds
// transposed, which lanes exchange through shared memory: dx is the row step transposed, and the inputs of its taps,
// times x, are the sums for weight_row. Strips of the second overlap, since dr is not stored.
//
// Predicted for an H200, x (1, 36, 480, 640), K = 11, bytes of both sweeps, not yet run on a GPU; see
// striped_conv.cu. The floor is that of one sweep, which would not have the registers.
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

// Where the sweeps' sums are among the partial ones: a sweep's parts come after those of the one before, and are 0 in
// the other one's columns.
struct Parts {
  void* partial;
  int64_t first;
  int column;  // of its K + 1
};

template <int K>
__device__ void store_sums(const Parts& parts, float (&sums)[K + 1], const StripedConv& conv, const Strip& strip,
                           const Sweep& sweep) {
#pragma unroll
  for (int k = 0; k <= K; ++k) sums[k] = sum_of_strip(sums[k], sweep);
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
template <int K, int kVector = kLaneColumns>
constexpr int kRowWarps = K == 3 ? (kVector == kLaneColumns ? 20 : 16) : (K == 7 ? 14 : 12);

template <typename T, int K, int kVector>
__global__ void __launch_bounds__(kThreads, (kVector > 1 ? kColumnWarps<K> : kUnalignedWarps<K>) / kBlockWarps)
    striped_conv_sweep_backward_column(StripedConv conv, StripedConvGradients gradients, Image ds_image, Parts parts,
                                       Sweep sweep) {
  constexpr int kRows = 2, kHalf = K / 2, kHalo = kHaloVectors<K>;
  __shared__ SharedRows<kRows, kHalo> stages[kBlockWarps];
  auto& stage = stages[threadIdx.y];
  const Strip strip(sweep, conv.size);
  const int place = SharedRows<kRows, kHalo>::place(strip, sweep.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - sweep.lead, steps = sweep.lead + sweep.rows + kHalf;
  const bool needs_s = conv.gate.data != nullptr || conv.activation != Activation::none;
  RowFeed<T, kVector, kRows, kHalo> x(conv.x, strip, sweep, first, kHalf);
  Cursor<const T, kVector> gate(conv.gate, strip, first - kHalf), dy(gradients.dy, strip, first - kHalf);
  Cursor<T, kVector> dgate(gradients.dgate, strip, first - kHalf);
  Cursor<float, kVector> ds(ds_image, strip, first - kHalf);
  float window[K - 1 + kRows][kLaneColumns] = {};  // rows of r
  float sums[K + 1] = {};
  x.load();
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    x.store(stage, half);
    __syncwarp();
    x.load();
    Words<T, kLaneColumns> dys[kRows], gates[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_mine = strip.has(first + step + r - kHalf);
      dys[r] = dy.load(is_mine);
      gates[r] = gate.load(is_mine && conv.gate.data);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      const LaneWindow<kHalo> seen(stage.row(half, r) + place);
      const Float4 intermediate = row_step(row, seen, i >= 0 && i < strip.height);
#pragma unroll
      for (int v = 0; v < kLaneColumns; ++v) window[K - 1 + r][v] = intermediate.value[v];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_mine = strip.has(first + step + r - kHalf);
      Float4 gradient = to_accum(dys[r]);
      if (needs_s) {
        Float4 s, slope;
#pragma unroll
        for (int v = 0; v < kLaneColumns; ++v) {
          s.value[v] = col.bias;
          slope.value[v] = is_mine ? 1 : 0;
#pragma unroll
          for (int k = 0; k < K; ++k) s.value[v] += col.weight[k] * window[r + k][v];
        }
        if (conv.activation == Activation::gelu && is_mine) {
#pragma unroll
          for (int v = 0; v < kLaneColumns; ++v) {
            slope.value[v] = gelu_slope(s.value[v]);
            s.value[v] = gelu(s.value[v]);
          }
        }
        if (conv.gate.data) {
#pragma unroll
          for (int v = 0; v < kLaneColumns; ++v) {
            s.value[v] *= gradient.value[v];
            gradient.value[v] *= to_accum(gates[r]).value[v];
          }
          dgate.store(to_storage<T>(s), is_mine);
        }
#pragma unroll
        for (int v = 0; v < kLaneColumns; ++v) gradient.value[v] *= slope.value[v];
        ds.store(to_storage<float>(gradient), is_mine);
      }
#pragma unroll
      for (int v = 0; v < kLaneColumns; ++v) {
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] += gradient.value[v] * window[r + k][v];
      }
      sums[K] += sum_of_float4(gradient);
    }
#pragma unroll
    for (int j = 0; j < K - 1; ++j) {
#pragma unroll
      for (int v = 0; v < kLaneColumns; ++v) window[j][v] = window[j + kRows][v];
    }
  }
  store_sums<K>(parts, sums, conv, strip, sweep);
}

// The factor of row i of ds in the sum of all dr, the gradient of weight_row's bias. (Summing dr itself would also sum
// its rounding.)
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
    striped_conv_sweep_backward_row(StripedConv conv, StripedConvGradients gradients, Image ds_image, Parts parts,
                                    Sweep sweep) {
  constexpr int kRows = 4, kHalf = K / 2, kHalo = kHaloVectors<K>;
  __shared__ SharedRows<kRows, kHalo> stages[kBlockWarps];
  auto& stage = stages[threadIdx.y];
  const Strip strip(sweep, conv.size);
  const int place = SharedRows<kRows, kHalo>::place(strip, sweep.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - sweep.lead, steps = sweep.lead + sweep.rows + kHalf;
  const int end = min(strip.end + kHalf, strip.height);
  Cursor<const S, kVector> ds(ds_image, strip, first);
  Cursor<const T, kVector> x(conv.x, strip, first - kHalf);
  Cursor<T, kVector> dx(gradients.dx, strip, first - kHalf);
  const float all_taps = sum_of_taps(col, kHalf, K);
  float partial[K - 1][kLaneColumns] = {};  // of the rows of dr, as in forward of those of s
  float sums[K + 1] = {};
  for (int i = threadIdx.x; i < 2 * kRows * stage.kRowStride; i += kWarp) stage.values[i] = {};  // beside strips
  __syncwarp();
  Words<S, kLaneColumns> next[kRows];
  const auto load_rows = [&](int step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      next[r] = ds.load(i >= 0 && i < end);
    }
  };
  load_rows(0);
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    Words<T, kLaneColumns> xs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      xs[r] = x.load(strip.writes && strip.has(first + step + r - kHalf));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      const Float4 seen = to_accum(next[r]);
      if (strip.writes && strip.has(i)) {
        const bool is_near_border = i < kHalf || i >= strip.height - kHalf;
        sums[K] += (is_near_border ? sum_of_taps(col, i, strip.height) : all_taps) * sum_of_float4(seen);
      }
      Float4 dr;
#pragma unroll
      for (int v = 0; v < kLaneColumns; ++v) {
        dr.value[v] = partial[0][v] + col.weight[0] * seen.value[v];
#pragma unroll
        for (int m = 0; m < K - 2; ++m) partial[m][v] = partial[m + 1][v] + col.weight[m + 1] * seen.value[v];
        partial[K - 2][v] = col.weight[K - 1] * seen.value[v];
      }
      stage.row(half, r)[place] = dr;
    }
    __syncwarp();
    load_rows(step + kRows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const LaneWindow<kHalo> dr(stage.row(half, r) + place);
      const Float4 seen = to_accum(xs[r]);
      Float4 result;
#pragma unroll
      for (int v = 0; v < kLaneColumns; ++v) {
        result.value[v] = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          result.value[v] += row.weight[k] * dr[v + kHalf - k];
          sums[k] += seen.value[v] * dr[v + kHalf - k];
        }
      }
      dx.store(to_storage<T>(result), strip.writes && strip.has(first + step + r - kHalf));
    }
  }
  store_sums<K>(parts, sums, conv, strip, sweep);
}

struct Sweeps {
  Sweep column, row;
  bool stores_ds;
};

Sweeps sweeps_of(const StripedConv& conv) {
  Sweeps sweeps;
  with_taps(conv, [&](auto, auto K) {
    sweeps.column = sweep_over(conv.size, kColumnWarps<K>, K / 2);
    sweeps.row = sweep_over(conv.size, kRowWarps<K>, K / 2, kLaneColumns * kHaloVectors<K>);
  });
  sweeps.stores_ds = conv.gate.data != nullptr || conv.activation != Activation::none;
  return sweeps;
}

}  // namespace

namespace seemore {

StripedConvWorkspace striped_conv_workspace(const StripedConv& conv) {
  const Sweeps sweeps = sweeps_of(conv);
  const Size& size = conv.size;
  return {sweeps.column.parts(size) + sweeps.row.parts(size),
          sweeps.stores_ds ? size.batch * size.channels * size.height * size.width : 0};
}

void striped_conv_backward(const StripedConv& conv, const StripedConvGradients& gradients, void* stream) {
  const Sweeps sweeps = sweeps_of(conv);
  if (sweeps.column.strips == 0) return;
  const Size& size = conv.size;
  const int64_t plane = size.height * size.width;
  const Image stored{gradients.scratch, size.channels * plane, plane, size.width, 1};
  const Image ds = sweeps.stores_ds ? stored : gradients.dy;
  const auto images = {conv.x, conv.gate, gradients.dy, gradients.dx, gradients.dgate};
  int vector_size = vector_of(images, size.width, bytes_of(conv.dtype));
  if (sweeps.stores_ds) vector_size = vector_of({stored}, size.width, sizeof(float), vector_size);
  const int taps = static_cast<int>(conv.taps);
  const Parts column{gradients.partial, 0, taps + 1}, row{gradients.partial, sweeps.column.parts(size), 0};
  with_taps(conv, [&](auto zero, auto K) {
    using T = decltype(zero);
    with_vector(vector_size, [&](auto vector) {
      const auto sweep_rows = [&](auto ds_zero) {
        using S = decltype(ds_zero);
        LAUNCH((striped_conv_sweep_backward_row<S, T, K, vector>), sweeps.row.grid("striped_conv_backward"), kBlock, 0,
               stream, conv, gradients, ds, row, sweeps.row);
      };
      LAUNCH((striped_conv_sweep_backward_column<T, K, vector>), sweeps.column.grid("striped_conv_backward"), kBlock, 0,
             stream, conv, gradients, ds, column, sweeps.column);
      sweeps.stores_ds ? sweep_rows(float()) : sweep_rows(zero);
    });
  });
}

}  // namespace seemore
