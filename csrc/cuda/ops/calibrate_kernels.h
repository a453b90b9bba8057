// Parts of the kernels of calibrate: small maps, bilinear positions, strips of an image, 3x3 taps, and the product with
// a C x C matrix.
#pragma once

#include <algorithm>

#include "cuda/common/access.h"
#include "cuda/common/axis.h"
#include "params/calibrate.h"

namespace calibrating {

using seemore::Calibrate;
using seemore::Image;

// One of the `planes` of images and channels.
struct Plane {
  int64_t batch, channel;

  __device__ Plane(unsigned number, int64_t channels)
      : batch(number / static_cast<unsigned>(channels)), channel(number % static_cast<unsigned>(channels)) {}

  template <typename T>
  __device__ T* of(const Image& image) const {
    return static_cast<T*>(image.data) + batch * image.batch + channel * image.channel;
  }
};

// A small map, (C, B, height, width).
template <typename A>
struct Map {
  A* data;
  int64_t batch;
  int height, width;

  __host__ __device__ int64_t plane() const { return int64_t(height) * width; }
  __host__ __device__ int64_t pixels() const { return batch * plane(); }
  __device__ A* of(const Plane& at) const { return data + (at.channel * batch + at.batch) * plane(); }
};

template <typename A>
Map<A> map_of(const seemore::MapSize& size, A* data) {
  return {data, size.batch, static_cast<int>(size.height), static_cast<int>(size.width)};
}

// Aggregation number `level` before GELU, or, for recursive + 1, the last one after it.
template <typename A, typename Data>
Map<A> level_of(const Calibrate& inputs, Data* maps, int64_t level) {
  int64_t offset = 0;
  for (int64_t below = 1; below < level; ++below) offset += seemore::level_size(inputs, below).elements();
  return map_of(seemore::level_size(inputs, std::min(level, inputs.recursive)), static_cast<A*>(maps) + offset);
}

// A plane's `across` x `down` items, `each` of them for a thread, and blocks that have items of one plane only.
struct Items {
  int across, down, threads, each;
  unsigned blocks;  // of a plane

  Items(int64_t across, int64_t down, int each, int most = kMost)
      : across(static_cast<int>(across)), down(static_cast<int>(down)), each(each) {
    if (down > INT32_MAX / 2 / across) {
      throw std::runtime_error("calibrate: planes of " + std::to_string(across * down) +
                               " pieces of 4 x 16 pixels, expected at most 2^30");
    }
    threads = static_cast<int>(std::min<int64_t>(ceil_div(across * down, kWarp) * kWarp, most));
    blocks = static_cast<unsigned>(ceil_div(across * down, int64_t(threads) * each));
  }

  static constexpr int kMost = 128;
};

// All lanes' sums of 16 values: lanes l and l + 16 get number l's.
template <int kHalf = 8, typename A>
__device__ A sum_lanes(A (&values)[16]) {
  const bool is_upper = threadIdx.x & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const A other = is_upper ? values[i] : values[i + kHalf];
    values[i] = (is_upper ? values[i + kHalf] : values[i]) + __shfl_xor_sync(kAllLanes, other, kHalf);
  }
  if constexpr (kHalf > 1) return sum_lanes<kHalf / 2>(values);
  return values[0] + __shfl_xor_sync(kAllLanes, values[0], 16);
}

template <typename A>
__device__ A sum_lanes(A value) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// 3x3 taps around a pixel of a plane, weighted; transposed ones in reverse.
template <bool kTransposed, typename T, typename A>
__device__ A depthwise(const A* plane, int row, int column, int height, int width, const T* weight) {
  A sum = 0;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    const int i = row + tap / 3 - 1, j = column + tap % 3 - 1;
    const bool inside = i >= 0 && i < height && j >= 0 && j < width;
    if (inside) sum += to_accum(weight[kTransposed ? 8 - tap : tap]) * plane[int64_t(i) * width + j];
  }
  return sum;
}

// Matrices C x C are worked on in squares of kChunk x kChunk, by 8 warps; a lane has a pixel of the small map, a warp
// every eighth row of the square.
constexpr int kChunk = 48, kMixWarps = 8, kRowsOfAWarp = kChunk / kMixWarps;
constexpr int kMatrixRowStride = kChunk + 4, kPixelRowStride = kWarp + 4;  // for few bank conflicts, and packs of 4

// A lane's pixel of a small map: of B x height x width, one after another.
struct MapPixel {
  int64_t number, plane;  // `plane`: the first pixel of its image
  int row, column;
  bool exists;

  template <typename A>
  __device__ MapPixel(const Map<A>& map, int64_t tile) {
    const int64_t wanted = tile * kWarp + threadIdx.x;
    exists = wanted < map.pixels();
    number = exists ? wanted : 0;
    plane = number / map.plane() * map.plane();
    const int inside = static_cast<int>(number - plane);
    row = inside / map.width;
    column = inside % map.width;
  }
};

// Rows of `map`'s channels after depthwise 3x3 and bias, into shared memory: zeros beyond the last channel and pixel.
template <typename T, typename A>
__device__ void load_depthwise(A (*rows)[kPixelRowStride], const Calibrate& inputs, const Map<const A>& map,
                               const MapPixel& pixel, int first) {
  const T *const weight = static_cast<const T*>(inputs.weight_dw), *const bias = static_cast<const T*>(inputs.bias_dw);
#pragma unroll 2
  for (int row = threadIdx.y; row < kChunk; row += kMixWarps) {
    const int channel = first + row;
    A sum = 0;
    if (channel < inputs.size.channels && pixel.exists) {
      const A* const plane = map.data + channel * map.pixels() + pixel.plane;
      sum = depthwise<false>(plane, pixel.row, pixel.column, map.height, map.width, weight + channel * 9);
      sum += to_accum(bias[channel]);
    }
    rows[row][threadIdx.x] = sum;
  }
}

// The square of weight_pw whose first element is (row, column), transposed or not; zeros beyond C.
template <bool kTransposed, typename T, typename A>
__device__ void load_matrix(A (*matrix)[kMatrixRowStride], const Calibrate& inputs, int row, int column) {
  const int channels = static_cast<int>(inputs.size.channels);
  const T* const weight = static_cast<const T*>(inputs.weight_pw);
#pragma unroll 3
  for (int number = threadIdx.y * kWarp + threadIdx.x; number < kChunk * kChunk; number += kMixWarps * kWarp) {
    const int i = number / kChunk, j = number % kChunk;
    const bool inside = row + i < channels && column + j < channels;
    const A element = inside ? to_accum(weight[int64_t(row + i) * channels + column + j]) : A(0);
    (kTransposed ? matrix[j][i] : matrix[i][j]) = element;
  }
}

// result[n] += row (warp + 8 n) of the matrix times the pixel's column of `count` rows
template <typename A>
__device__ void multiply(A (&result)[kRowsOfAWarp], const A (*matrix)[kMatrixRowStride],
                         const A (*rows)[kPixelRowStride], int count) {
#pragma unroll 1
  for (int first = 0; first < count; first += 4) {
    A seen[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) seen[v] = rows[first + v][threadIdx.x];
#pragma unroll
    for (int n = 0; n < kRowsOfAWarp; ++n) {
      const auto weight = *reinterpret_cast<const Pack<A, 4>*>(&matrix[threadIdx.y + kMixWarps * n][first]);
#pragma unroll
      for (int v = 0; v < 4; ++v) result[n] += weight.value[v] * seen[v];
    }
  }
}

// calibrate_spread.cu. `unmixed`: gradient of depthwise 3x3's result, (C, B, height, width) of the last map.
void spread(const Calibrate& inputs, const seemore::CalibrateGradients& gradients, const void* unmixed, void* scratch,
            void* stream);
int64_t spread_parts(const Calibrate& inputs);    // agg_parts
int64_t spread_scratch(const Calibrate& inputs);  // elements of its `scratch`

}  // namespace calibrating
