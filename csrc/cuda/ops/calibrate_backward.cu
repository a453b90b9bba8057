// calibrate's gradients on CUDA.
//
// 1. gather: the transposed interpolation. Pixels between two rows of the small map give to both: their rows of dy are
//    read once, and added up along columns, then along rows, for the one above them (`below`) and the one below
//    (`above`).
// 2. mix_backward: C x C matrix and depthwise 3x3, on 32 pixels of the small map at a time.
// 3. calibrate_spread.cu: aggregations.
//
// Predicted, not yet run on a GPU (H200, 4.3 TB/s; registers and shared memory as ptxas reports for sm_90),
// calibrate_spread.cu and the two sums over parts included:
//
// | bfloat16                      | T: 1x36x480x640, recursive 2 | T: 32x36x64x64, 2 | L: 1x48x480x640, 1 |
// |-------------------------------|------------------------------|-------------------|--------------------|
// | dy, dy again, k, dk, maps MiB | 21, 21, 21, 21, 3            | 9, 9, 9, 9, 1     | 28, 28, 28, 28, 10 |
// | floor                         | 21 us                        | 9 us              | 30 us              |
// | dy again from L2              | 16 us                        | 7 us              | 23 us              |
// | predicted                     | 36 us                        | 18 us             | 50 us              |
//
// Instructions, as sm_90's code has them: 6 for each element of dy to gather, besides a thread's last sums, and 22 to
// spread. Five launches of 2 to 3 us by themselves. gather: 64 to 128 registers, up to 35 KiB of shared memory, 11 for
// 640 columns; mix_backward: 96 (147 in float64), 23 KiB (47); spread: 95 to 128 (200), so 4 blocks of 128 threads on a
// multiprocessor, which ask for 32 KiB at once, and 161 element by element; descend: 40 (48).

#include "cuda/ops/calibrate_kernels.h"

namespace {

using namespace calibrating;
using seemore::CalibrateGradients;

// Bands of rows between two rows of the small map, for which `before` is the same.
struct MapBands {
  static constexpr int kMost = 256, kSums = 2;
  int across, down;           // threads of a block: packs of V columns, bands
  int columns;                // of the small map, at most kSums for each of `across`
  unsigned segments, blocks;  // of a plane: side by side, and in all

  MapBands(int64_t width, int64_t small_height, int64_t small_width, int V) {
    const int64_t packs = ceil_div(width, V);
    across = 1;
    while (across < packs && across < kWarp) across *= 2;
    if (packs > kWarp) across = static_cast<int>(std::min<int64_t>(ceil_div(packs, kWarp) * kWarp, kMost));
    down = 1;
    while (down < small_height && across * down < Items::kMost) down *= 2;
    columns = static_cast<int>(small_width <= kSums * across ? small_width : across);
    segments = static_cast<unsigned>(ceil_div(small_width, columns));
    const int64_t all = segments * ceil_div(small_height, down);
    if (all > INT32_MAX) throw std::runtime_error("calibrate: too large a map for its grid");
    blocks = static_cast<unsigned>(all);
  }

  // Of V columns for each thread across, with gaps: threads read at distances of 4 or 16.
  static __host__ __device__ int place(int column) { return column + column / kWarp; }
  __host__ __device__ int row_stride(int V) const { return place(across * V); }
  size_t shared_bytes(int V, size_t bytes) const {
    return 4 * down * row_stride(V) * bytes + (columns + 2) * sizeof(int);
  }
};

template <typename A>
__device__ A sum_between(const A* values, int first, int last, int from, int to) {
  first = first > from ? first - from : 0;
  last = (last < to ? last : to) - from;
  A sum = 0;
  for (int column = first; column < last; ++column) sum += values[MapBands::place(column)];
  return sum;
}

// Rows that a thread asks for before it works on as many.
template <typename T>
constexpr int kGatheredRows = sizeof(T) == 8 ? 2 : 4;

// Blocks on a multiprocessor are given so that ptxas has registers for a round of loads beside the one before.
template <typename T, int V, typename A = Accumulation<T>>
__global__ void __launch_bounds__(MapBands::kMost, 2)
    calibrate_gather(Calibrate inputs, MapBands bands, Image dy, Axis<A> rows, Axis<A> columns, Map<A> below,
                     Map<A> above) {
  DYNAMIC_SHARED(A, shared);  // for each band its columns' sums: below, for the left and right pixel; above, likewise
  const int row_stride = bands.row_stride(V), width = bands.across * V;
  int* const starts =
      reinterpret_cast<int*>(shared + 4 * bands.down * row_stride);  // from the column before the first on
  const Plane plane(blockIdx.x / bands.blocks, inputs.size.channels);
  const unsigned block = blockIdx.x % bands.blocks;
  const int thread = threadIdx.y * bands.across + threadIdx.x, threads = bands.across * bands.down;
  const int first_band = static_cast<int>(block / bands.segments) * bands.down, band = first_band + threadIdx.y;
  const int first_column = static_cast<int>(block % bands.segments) * bands.columns;
  const int rest = columns.small - first_column, count = rest < bands.columns ? rest : bands.columns;
  for (int number = thread; number < count + 2; number += threads) {
    starts[number] = columns.start(first_column - 1 + number);
  }
  const int first_row = rows.start(band), last_row = rows.start(band + 1);
  __syncthreads();
  A sums[MapBands::kSums][2] = {};
  for (int from = starts[0] / V * V; from < starts[count + 1]; from += width) {
    const int column = from + threadIdx.x * V;
    A lower[V] = {}, upper[V] = {};
    const T* seen = plane.of<const T>(dy) + first_row * dy.row + column;
    Words<T, V> next[kGatheredRows<T>];
    const auto load_rows = [&](int row) {
#pragma unroll
      for (int i = 0; i < kGatheredRows<T>; ++i) {
        next[i] = load<V, V>(seen, row + i < last_row ? columns.pixels - column : 0);
        seen += dy.row;
      }
    };
    load_rows(first_row);
#pragma unroll 1
    for (int row = first_row; row < last_row; row += kGatheredRows<T>) {
      Words<T, V> now[kGatheredRows<T>];
#pragma unroll
      for (int i = 0; i < kGatheredRows<T>; ++i) now[i] = next[i];
      load_rows(row + kGatheredRows<T>);
#pragma unroll
      for (int i = 0; i < kGatheredRows<T>; ++i) {
        const A share = rows.position(row + i) - static_cast<A>(band);
        const auto gradient = to_accum(now[i]);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          lower[v] += (1 - share) * gradient.value[v];
          upper[v] += share * gradient.value[v];
        }
      }
    }
    A* const mine = shared + 4 * threadIdx.y * row_stride;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A position = columns.position(column + v), share = position - static_cast<A>(columns.before(position));
      const int place = MapBands::place(threadIdx.x * V + v);
      mine[place] = (1 - share) * lower[v];
      mine[place + row_stride] = share * lower[v];
      mine[place + 2 * row_stride] = (1 - share) * upper[v];
      mine[place + 3 * row_stride] = share * upper[v];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < MapBands::kSums; ++n) {
      const int number = thread + n * threads, j = number % count;
      if (number / count >= bands.down) continue;
      const bool is_last = first_column + j == columns.small - 1;  // it is both, left and right
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const A* const left = shared + (4 * (number / count) + 2 * half) * row_stride;
        sums[n][half] += sum_between(left, starts[j + 1], starts[j + 2], from, from + width);
        sums[n][half] += sum_between(left + row_stride, starts[j], starts[is_last ? j + 2 : j + 1], from, from + width);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < MapBands::kSums; ++n) {
    const int number = thread + n * threads, row = first_band + number / count;
    if (number / count >= bands.down || row >= below.height) continue;
    const int64_t to = int64_t(row) * below.width + first_column + number % count;
    below.of(plane)[to] = sums[n][0];
    above.of(plane)[to] = sums[n][1];
  }
}

// Load the gradient of the mixed map, from the results of gather, into shared memory; zeros beyond the last channel and
// pixel.
template <typename A>
__device__ void load_gathered(A (*rows)[kPixelRowStride], const Map<const A>& below, const Map<const A>& above,
                              const MapPixel& pixel, int first, int channels) {
#pragma unroll
  for (int n = 0; n < kRowsOfAWarp; ++n) {
    const int row = threadIdx.y + kMixWarps * n, channel = first + row;
    A sum = 0;
    if (channel < channels && pixel.exists) {
      const int64_t at = channel * below.pixels() + pixel.number;
      sum = below.data[at];
      if (pixel.row > 0) sum += above.data[at - below.width];
      if (pixel.row == below.height - 1) sum += above.data[at];
    }
    rows[row][threadIdx.x] = sum;
  }
}

// A block has a part of the pixels and a square of the matrix; those of the first rows also make d, depthwise 3x3's
// gradient, and the sums for weight_dw and bias_dw.
template <typename T, typename A = Accumulation<T>>
__global__ void __launch_bounds__(kMixWarps* kWarp, sizeof(A) == 8 ? 1 : 2)
    calibrate_mix_backward(Calibrate inputs, Map<const A> activated, Map<const A> below, Map<const A> above, A* d,
                           A* partial, unsigned parts) {
  __shared__ __align__(16) A matrix[kChunk][kMatrixRowStride];
  __shared__ __align__(16) A mixed[kChunk][kPixelRowStride];    // gradient of the matrix's result
  __shared__ __align__(16) A unmixed[kChunk][kPixelRowStride];  // input of the matrix
  const int channels = static_cast<int>(inputs.size.channels);
  const unsigned chunks = (channels + kChunk - 1) / kChunk, part = blockIdx.x % parts, square = blockIdx.x / parts;
  const int first_row = static_cast<int>(square / chunks) * kChunk;
  const int first_column = static_cast<int>(square % chunks) * kChunk;
  const int thread = threadIdx.y * kWarp + threadIdx.x, row = thread / 16, column = thread % 16;
  const int64_t tiles = (activated.pixels() + kWarp - 1) / kWarp;
  const int columns = channels + 1 + 9 + 1;  // of the partial sums
  A* const sums = partial + int64_t(part) * channels * columns;
  A matrix_sums[3][3] = {};        // rows row + 16 m, columns column + 16 n of the square
  A bias_sums[kRowsOfAWarp] = {};  // a lane's
  const int64_t first_tile = part * tiles / parts;
  for (int64_t tile = first_tile; tile < (part + 1) * tiles / parts; ++tile) {
    const MapPixel pixel(activated, tile);
    A result[kRowsOfAWarp] = {};
    load_depthwise<T>(unmixed, inputs, activated, pixel, first_column);
    for (int first = first_row; first < (first_row == 0 ? channels : first_row + 1); first += kChunk) {
      load_gathered(mixed, below, above, pixel, first, channels);
      if (first_row == 0) load_matrix<true, T>(matrix, inputs, first, first_column);
      __syncthreads();
      if (first_row == 0) multiply(result, matrix, mixed, channels - first < kChunk ? channels - first : kChunk);
      if (first == first_row) {
#pragma unroll
        for (int n = 0; n < kRowsOfAWarp; ++n) bias_sums[n] += mixed[threadIdx.y + kMixWarps * n][threadIdx.x];
#pragma unroll 1
        for (int at = 0; at < kWarp; at += 4) {
          Pack<A, 4> seen[3];
#pragma unroll
          for (int n = 0; n < 3; ++n) seen[n] = *reinterpret_cast<const Pack<A, 4>*>(&unmixed[column + 16 * n][at]);
#pragma unroll
          for (int m = 0; m < 3; ++m) {
            const auto gradient = *reinterpret_cast<const Pack<A, 4>*>(&mixed[row + 16 * m][at]);
#pragma unroll
            for (int n = 0; n < 3; ++n) {
#pragma unroll
              for (int v = 0; v < 4; ++v) matrix_sums[m][n] += gradient.value[v] * seen[n].value[v];
            }
          }
        }
      }
      __syncthreads();
    }
    if (first_row != 0) continue;
    // One row at a time, through shared memory: for all of them there are too few registers.
#pragma unroll
    for (int n = 0; n < kRowsOfAWarp; ++n) unmixed[threadIdx.y + kMixWarps * n][threadIdx.x] = result[n];
#pragma unroll 1
    for (int n = threadIdx.y; n < kChunk && first_column + n < channels; n += kMixWarps) {
      const int channel = first_column + n;
      const A here = unmixed[n][threadIdx.x];
      A values[16] = {};  // for the 9 taps and the bias
      if (pixel.exists) {
        d[channel * activated.pixels() + pixel.number] = here;
        const A* const plane = activated.data + channel * activated.pixels() + pixel.plane;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          const int i = pixel.row + tap / 3 - 1, j = pixel.column + tap % 3 - 1;
          const bool inside = i >= 0 && i < activated.height && j >= 0 && j < activated.width;
          if (inside) values[tap] = here * plane[int64_t(i) * activated.width + j];
        }
        values[9] = here;
      }
      const A sum = sum_lanes(values);
      A* const to = sums + int64_t(channel) * columns + channels + 1 + threadIdx.x;
      if (threadIdx.x < 10) *to = tile == first_tile ? sum : *to + sum;
    }
  }

#pragma unroll
  for (int m = 0; m < 3; ++m) {
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      const int i = first_row + row + 16 * m, j = first_column + column + 16 * n;
      if (i < channels && j < channels) sums[int64_t(i) * columns + j] = matrix_sums[m][n];
    }
  }
#pragma unroll
  for (int n = 0; n < kRowsOfAWarp; ++n) {
    const A bias_sum = sum_lanes(bias_sums[n]);
    const int i = first_row + threadIdx.y + kMixWarps * n;
    if (first_column == 0 && i < channels && threadIdx.x == 0) sums[int64_t(i) * columns + channels] = bias_sum;
  }
}

constexpr int64_t kMostMixParts = 2 * 132;  // two for each multiprocessor of an H200

int64_t mix_parts(const Calibrate& inputs) {
  const auto last = seemore::level_size(inputs, inputs.recursive);
  return std::min(ceil_div(last.batch * last.height * last.width, kWarp), kMostMixParts);
}

template <typename T>
void backward(const Calibrate& inputs, const CalibrateGradients& gradients, void* stream) {
  using A = Accumulation<T>;
  const auto& size = inputs.size;
  const auto last = seemore::level_size(inputs, inputs.recursive);
  const auto scratch = [&](int number) { return static_cast<A*>(gradients.scratch) + number * last.elements(); };

  const Axis<A> rows(size.height, last.height), columns(size.width, last.width);
  constexpr int kMost = 16 / sizeof(T);
  with_vector<kMost>(vector_of({gradients.dy}, size.width, sizeof(T), kMost), [&](auto vector) {
    constexpr int V = vector;
    const MapBands bands(size.width, last.height, last.width, V);
    const auto grid = grid_of(size.batch * size.channels * bands.blocks, "calibrate_backward");
    LAUNCH((calibrate_gather<T, V>), grid, dim3(bands.across, bands.down), bands.shared_bytes(V, sizeof(A)), stream,
           inputs, bands, gradients.dy, rows, columns, map_of(last, scratch(0)), map_of(last, scratch(1)));
  });

  const auto parts = mix_parts(inputs), chunks = ceil_div(size.channels, kChunk);
  const auto grid = grid_of(parts * chunks * chunks, "calibrate_backward");
  LAUNCH(calibrate_mix_backward<T>, grid, dim3(kWarp, kMixWarps), 0, stream, inputs,
         level_of<const A>(inputs, gradients.maps, inputs.recursive + 1), map_of<const A>(last, scratch(0)),
         map_of<const A>(last, scratch(1)), scratch(2), static_cast<A*>(gradients.partial_mix),
         static_cast<unsigned>(parts));

  spread(inputs, gradients, scratch(2), scratch(3), stream);
}

}  // namespace

namespace seemore {

CalibrateWorkspace calibrate_workspace(const Calibrate& inputs) {
  if (inputs.size.batch == 0) return {0, 0, 0};
  const int64_t elements = level_size(inputs, inputs.recursive).elements();
  return {calibrating::spread_parts(inputs), mix_parts(inputs), 3 * elements + calibrating::spread_scratch(inputs)};
}

void calibrate_backward(const Calibrate& inputs, const CalibrateGradients& gradients, void* stream) {
  if (inputs.size.batch == 0) return;
  with_type(inputs.dtype, [&](auto zero) { backward<decltype(zero)>(inputs, gradients, stream); });
}

}  // namespace seemore
