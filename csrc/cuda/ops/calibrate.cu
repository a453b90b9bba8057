// calibrate's forward on CUDA: k + bilinear(pointwise(depthwise_3x3(aggregations of k))).
//
// 1. aggregate: k -> the first two aggregations (the only one for recursive = 1). A lane has 4 columns and sweeps down
//    16 rows, so a warp reads 128 columns side by side; four lanes add up the inputs of a pixel of the second map.
// 2. aggregate_again: further ones, for recursive > 2.
// 3. mix: depthwise 3x3 and the C x C matrix, on 32 pixels of the last map at a time.
// 4. add_stretched: k + bilinear -> y. A thread has a few columns of 4 rows, interpolates two or three rows of the map
//    to these columns, and each row of y between two of them.
//
// Predicted, not yet run on a GPU (H200, 4.3 TB/s; registers and shared memory as ptxas reports for sm_90):
//
// | bfloat16                | T: 1x36x480x640, recursive 2 | T: 32x36x64x64, 2 | L: 1x48x480x640, 1 |
// |-------------------------|------------------------------|-------------------|--------------------|
// | k, k again, y, maps MiB | 21, 21, 21, 3                | 9, 9, 9, 1        | 28, 28, 28, 7      |
// | floor                   | 16 us                        | 7 us              | 22 us              |
// | k again from L2         | 11 us                        | 5 us              | 15 us              |
// | predicted               | 22 us                        | 10 us             | 33 us              |
//
// Instructions, as sm_90's code has them: 8 for each element of k to aggregate and 37 to interpolate, addresses
// included. A launch takes 2 to 3 us by itself. aggregate: 64 to 96 registers, enough for all 16 loads of a thread at
// once, add_stretched: 32 to 72, mix: 64 (76 in float64) and 17 KiB (33) of shared memory.

#include "cuda/ops/calibrate_kernels.h"

namespace {

using namespace calibrating;

// Blocks on a multiprocessor are given so that ptxas has registers for all loads at once.
template <typename T, int kLevels, int kVector, typename A = Accumulation<T>>
__global__ void __launch_bounds__(Items::kMost, 5)
    calibrate_aggregate(Calibrate inputs, Items items, Map<A> one, Map<A> two, A* activated) {
  const Plane plane(blockIdx.x / items.blocks, inputs.size.channels);
  const int item = blockIdx.x % items.blocks * items.threads + threadIdx.x;
  const int strip = item / items.across, column = item % items.across;
  const bool inside = strip < items.down;
  const T* const shared_weight = static_cast<const T*>(inputs.weight_agg) + plane.channel * 16;
  const A bias = to_accum(static_cast<const T*>(inputs.bias_agg)[plane.channel]);
  A sums[4] = {};
  if (inside) {
    A weight[16];
#pragma unroll
    for (int tap = 0; tap < 16; ++tap) weight[tap] = to_accum(shared_weight[tap]);
    const T* const k = plane.of<const T>(inputs.k) + strip * 16 * inputs.k.row + column * 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int there = kLevels == 2 || strip * 4 + r < one.height ? 4 : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto seen = to_accum(load<kVector, 4>(k + (4 * r + i) * inputs.k.row, there));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r] += weight[4 * i + j] * seen.value[j];
      }
      sums[r] += bias;
    }
    A* const to = one.of(plane) + int64_t(strip) * 4 * one.width + column;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (kLevels == 2 || strip * 4 + r < one.height) to[int64_t(r) * one.width] = sums[r];
    }
  }
  if (kLevels == 1) {
    A* const to = activated + (one.of(plane) - one.data) + int64_t(strip) * 4 * one.width + column;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (inside && strip * 4 + r < one.height) to[int64_t(r) * one.width] = gelu(sums[r]);
    }
    return;
  }
  A sum = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) sum += to_accum(shared_weight[4 * r + column % 4]) * gelu(sums[r]);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  sum += bias;
  if (inside && column % 4 == 0) {
    const int64_t to = two.of(plane) - two.data + int64_t(strip) * two.width + column / 4;
    two.data[to] = sum;
    if (activated) activated[to] = gelu(sum);
  }
}

template <typename T, typename A = Accumulation<T>>
__global__ void __launch_bounds__(Items::kMost)
    calibrate_aggregate_again(Calibrate inputs, Items items, Map<A> from, Map<A> map, A* activated) {
  const Plane plane(blockIdx.x / items.blocks, inputs.size.channels);
  const int item = blockIdx.x % items.blocks * items.threads + threadIdx.x;
  const int row = item / items.across, column = item % items.across;
  if (row >= items.down) return;
  const T* const weight = static_cast<const T*>(inputs.weight_agg) + plane.channel * 16;
  const A* const seen = from.of(plane) + int64_t(row) * 4 * from.width + column * 4;
  A sum = to_accum(static_cast<const T*>(inputs.bias_agg)[plane.channel]);
#pragma unroll
  for (int tap = 0; tap < 16; ++tap) sum += to_accum(weight[tap]) * gelu(seen[tap / 4 * from.width + tap % 4]);
  const int64_t to = map.of(plane) - map.data + int64_t(row) * map.width + column;
  map.data[to] = sum;
  if (activated) activated[to] = gelu(sum);
}

template <typename T, typename A = Accumulation<T>>
__global__ void __launch_bounds__(kMixWarps* kWarp) calibrate_mix(Calibrate inputs, Map<const A> activated, A* mixed) {
  __shared__ __align__(16) A matrix[kChunk][kMatrixRowStride];
  __shared__ __align__(16) A rows[kChunk][kPixelRowStride];
  const int channels = static_cast<int>(inputs.size.channels);
  const unsigned chunks = (channels + kChunk - 1) / kChunk;
  const MapPixel pixel(activated, blockIdx.x / chunks);
  const int first_row = static_cast<int>(blockIdx.x % chunks) * kChunk;
  A result[kRowsOfAWarp] = {};
  for (int first = 0; first < channels; first += kChunk) {
    load_matrix<false, T>(matrix, inputs, first_row, first);
    load_depthwise<T>(rows, inputs, activated, pixel, first);
    __syncthreads();
    multiply(result, matrix, rows, channels - first < kChunk ? channels - first : kChunk);
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < kRowsOfAWarp; ++n) {
    const int channel = first_row + threadIdx.y + kMixWarps * n;
    if (channel >= channels || !pixel.exists) continue;
    const A bias = to_accum(static_cast<const T*>(inputs.bias_pw)[channel]);
    mixed[channel * activated.pixels() + pixel.number] = result[n] + bias;
  }
}

// Rows of a thread. Their `before` is one of two neighbours: rows of the map are at least 4 rows of the image apart.
constexpr int kStretchedRows = 4;
// Columns of a thread: with 8 of them a multiprocessor has registers for half as many threads.
template <typename T>
constexpr int kStretchedColumns = sizeof(T) == 8 ? 2 : 4;

// A row of the small map, interpolated to the columns from `column` on.
template <int V, typename A>
__device__ void stretch(A (&stretched)[V], const A* row, const Axis<A>& columns, int column) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const A position = columns.position(column + v);
    const int left = columns.before(position);
    const A share = position - static_cast<A>(left);
    stretched[v] = (1 - share) * row[left] + share * row[columns.after(left)];
  }
}

template <typename T, int V, typename A = Accumulation<T>>
__global__ void __launch_bounds__(Items::kMost)
    calibrate_add_stretched(Calibrate inputs, Items items, Map<const A> map, Axis<A> rows, Axis<A> columns, Image y) {
  const Plane plane(blockIdx.x / items.blocks, inputs.size.channels);
  const int item = blockIdx.x % items.blocks * items.threads + threadIdx.x;
  const int first = item / items.across * kStretchedRows, column = item % items.across * V;
  if (first >= rows.pixels) return;
  const int there = columns.pixels - column;
  const T* const from = plane.of<const T>(inputs.k) + first * inputs.k.row + column;
  T* const to = plane.of<T>(y) + first * y.row + column;
  Words<T, V> seen[kStretchedRows];
#pragma unroll
  for (int i = 0; i < kStretchedRows; ++i) {
    seen[i] = load<V, V>(from + i * inputs.k.row, first + i < rows.pixels ? there : 0);
  }
  const A* const small = map.of(plane);
  int above = rows.before(rows.position(first));
  const int below = rows.after(above), last = rows.before(rows.position(first + kStretchedRows - 1));
  A top[V], bottom[V], next[V] = {};
  stretch(top, small + int64_t(above) * map.width, columns, column);
  stretch(bottom, small + int64_t(below) * map.width, columns, column);
  if (last != above) stretch(next, small + int64_t(rows.after(below)) * map.width, columns, column);
#pragma unroll
  for (int i = 0; i < kStretchedRows; ++i) {
    if (first + i >= rows.pixels) continue;
    const A position = rows.position(first + i);
    const int now = rows.before(position);
    const A share = position - static_cast<A>(now);
    Pack<A, V> result = to_accum(seen[i]);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (now != above) {
        top[v] = bottom[v];
        bottom[v] = next[v];
      }
      result.value[v] += (1 - share) * top[v] + share * bottom[v];
    }
    above = now;
    store<V>(to + i * y.row, there, to_storage<T>(result));
  }
}

template <typename T>
void forward(const Calibrate& inputs, const Image& y, void* maps, void* small, void* stream) {
  using A = Accumulation<T>;
  const auto& size = inputs.size;
  const int64_t planes = size.batch * size.channels, recursive = inputs.recursive;
  const auto grid = [&](const Items& items) { return grid_of(planes * items.blocks, "calibrate"); };

  const auto one = level_of<A>(inputs, maps, 1), two = level_of<A>(inputs, maps, std::min<int64_t>(recursive, 2));
  const auto activated = level_of<A>(inputs, maps, recursive + 1);
  const Items strips(one.width, ceil_div(one.height, 4), 1);
  with_vector(vector_of({inputs.k}, 4, sizeof(T)), [&](auto vector) {
    if (recursive == 1) {
      LAUNCH((calibrate_aggregate<T, 1, vector>), grid(strips), strips.threads, 0, stream, inputs, strips, one, two,
             activated.data);
    } else {
      LAUNCH((calibrate_aggregate<T, 2, vector>), grid(strips), strips.threads, 0, stream, inputs, strips, one, two,
             recursive == 2 ? activated.data : nullptr);
    }
  });
  for (int64_t level = 3; level <= recursive; ++level) {
    const auto from = level_of<A>(inputs, maps, level - 1), map = level_of<A>(inputs, maps, level);
    const Items pixels(map.width, map.height, 1);
    LAUNCH(calibrate_aggregate_again<T>, grid(pixels), pixels.threads, 0, stream, inputs, pixels, from, map,
           level == recursive ? activated.data : nullptr);
  }

  const Map<const A> last{activated.data, activated.batch, activated.height, activated.width};
  const int64_t tiles = ceil_div(last.pixels(), kWarp) * ceil_div(size.channels, kChunk);
  LAUNCH(calibrate_mix<T>, grid_of(tiles, "calibrate"), dim3(kWarp, kMixWarps), 0, stream, inputs, last,
         static_cast<A*>(small));

  const Map<const A> mixed{static_cast<const A*>(small), last.batch, last.height, last.width};
  const Axis<A> rows(size.height, mixed.height), columns(size.width, mixed.width);
  constexpr int kMost = kStretchedColumns<T>;
  with_vector<kMost>(vector_of({inputs.k, y}, size.width, sizeof(T), kMost), [&](auto vector) {
    constexpr int V = vector;
    const Items pieces(ceil_div(size.width, V), ceil_div(size.height, kStretchedRows), 1);
    LAUNCH((calibrate_add_stretched<T, V>), grid(pieces), pieces.threads, 0, stream, inputs, pieces, mixed, rows,
           columns, y);
  });
}

}  // namespace

namespace seemore {

void calibrate(const Calibrate& inputs, const Image& y, void* maps, void* small, void* stream) {
  if (inputs.size.batch == 0) return;
  with_type(inputs.dtype, [&](auto zero) { forward<decltype(zero)>(inputs, y, maps, small, stream); });
}

}  // namespace seemore
