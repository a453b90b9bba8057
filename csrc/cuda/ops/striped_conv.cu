// striped_conv on CUDA for K = 3, 7, 11: y = gate * activation(column(row(x) + bias_row) + bias_col), in one sweep.
//
// Every row of x gives a row of r = row(x) + bias_row, which at once goes into the K rows of s = column(r) that see it:
// a lane holds the partial sums of K - 1 of them for its columns. So x is read and y is written once, nothing else.
//
// Predicted for an H200 (132 multiprocessors at 1.98 GHz, 4.3 TB/s), x (1, 36, 480, 640), not yet run on a GPU. Time to
// issue is instructions per pixel, as sm_90's code has them, and 17 % more rows for K = 11 than are written. For widths
// that are a multiple of 2 only the loop is 5 to 12 % longer; for odd ones, element by element, 9 % (K = 11 in float32)
// to 31 % (K = 3 in 16 bits), and the stores of a warp ask for each sector four times.
//
//                     bytes    floor    instructions   to issue   predicted   registers   shared per block
//   K = 11 float32    88 MB    20.6 us  30 a pixel     11.7 us    24 us       168         10,240 bytes
//   K = 11 bfloat16   44 MB    10.3 us  33             12.6 us    16 us       157         10,240
//   K = 3 gelu bf16   44 MB    10.3 us  33             11.4 us    15 us       111          9,216

#include "cuda/ops/striped_conv_sweep.h"

namespace {

using seemore::Activation;
using seemore::Image;
using seemore::StripedConv;

template <int K>
constexpr int kWarps = K == 3 ? 16 : 12;

template <typename T, int K, int kVector>
__global__ void __launch_bounds__(kThreads, (kVector > 1 ? kWarps<K> : kUnalignedWarps<K>) / kBlockWarps)
    striped_conv_sweep_forward(StripedConv conv, Image y_image, float* sums, Sweep sweep) {
  constexpr int kRows = 4, kHalf = K / 2, kHalo = kHaloVectors<K>;
  __shared__ SharedRows<kRows, kHalo> stages[kBlockWarps];
  auto& stage = stages[threadIdx.y];
  const Strip strip(sweep, conv.size);
  const int place = SharedRows<kRows, kHalo>::place(strip, sweep.lanes);
  const Taps<T, K> row(conv.weight_row, conv.bias_row, strip.channel);
  const Taps<T, K> col(conv.weight_col, conv.bias_col, strip.channel);
  const int first = strip.row - sweep.lead, steps = sweep.lead + sweep.rows + kHalf;
  RowFeed<T, kVector, kRows, kHalo> x(conv.x, strip, sweep, first, kHalf);
  Cursor<const T, kVector> gate(conv.gate, strip, first - kHalf);
  Cursor<T, kVector> y(y_image, strip, first - kHalf);
  float partial[K - 1][kLaneColumns];  // partial[m] of the row m further down than the next one of s
#pragma unroll
  for (auto& row_sums : partial) {
#pragma unroll
    for (float& s : row_sums) s = col.bias;
  }
  float sum = 0;  // of the results of the lane
  x.load();
  for (int step = 0, half = 0; step < steps; step += kRows, half ^= 1) {
    x.store(stage, half);
    __syncwarp();
    x.load();
    Words<T, kLaneColumns> gates[kRows];
    if (conv.gate.data) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) gates[r] = gate.load(strip.has(first + step + r - kHalf));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + step + r;
      const LaneWindow<kHalo> seen(stage.row(half, r) + place);
      const Float4 intermediate = row_step(row, seen, i >= 0 && i < strip.height);
      Float4 result;
#pragma unroll
      for (int v = 0; v < kLaneColumns; ++v) {
        const float s = partial[0][v] + col.weight[K - 1] * intermediate.value[v];
#pragma unroll
        for (int m = 0; m < K - 2; ++m)
          partial[m][v] = partial[m + 1][v] + col.weight[K - 2 - m] * intermediate.value[v];
        partial[K - 2][v] = col.bias + col.weight[0] * intermediate.value[v];
        result.value[v] = s;
      }
      if (conv.activation == Activation::gelu) {
#pragma unroll
        for (float& s : result.value) s = gelu_to<T>(s);
      }
      if (conv.gate.data) {
#pragma unroll
        for (int v = 0; v < kLaneColumns; ++v) result.value[v] *= to_accum(gates[r]).value[v];
      }
      const auto rounded = to_storage<T>(result);
      y.store(rounded, strip.has(i - kHalf));
      if (sums && strip.has(i - kHalf)) sum += sum_of_float4(strip.real(to_accum(rounded)));
    }
  }
  if (sums) {
    sum = sum_of_strip(sum, sweep);
    const int64_t part = strip.part - strip.batch * sweep.down * sweep.across;
    const int64_t place = (part * conv.size.batch + strip.batch) * conv.size.channels + strip.channel;
    if (strip.lane == 0 && strip.end > strip.row) sums[place] = sum;
  }
}

}  // namespace

namespace seemore {

void striped_conv(const StripedConv& conv, const Image& y, void* stream) {
  striped_conv_with_sums(conv, y, nullptr, stream);
}

void striped_conv_with_sums(const StripedConv& conv, const Image& y, float* sums, void* stream) {
  with_taps(conv, [&](auto zero, auto K) {
    using T = decltype(zero);
    const Sweep sweep = sweep_over(conv.size, kWarps<K>, K / 2, 0, sums ? kUsualMultiprocessors : multiprocessors());
    if (sweep.strips == 0) return;
    with_vector(vector_of({conv.x, conv.gate, y}, conv.size.width, sizeof(T)), [&](auto vector) {
      LAUNCH((striped_conv_sweep_forward<T, K, vector>), sweep.grid("striped_conv"), kBlock, 0, stream, conv, y, sums,
             sweep);
    });
  });
}

int64_t striped_conv_sum_parts(const StripedConv& conv) {
  int64_t parts = 0;
  with_taps(conv, [&](auto, auto K) {
    const Sweep sweep = sweep_over(conv.size, kWarps<K>, K / 2);
    parts = sweep.down * sweep.across;
  });
  return parts;
}

}  // namespace seemore
