// The second stage of every gradient of weights and biases.
//
// A block has a channel. Its lanes are neighbouring columns, its warps take turns at the parts; their sums meet in
// shared memory and are added in the order of the warps.

#include "cuda/common/launch.h"
#include "cuda/common/types.h"
#include "params/sums.h"

namespace {

using seemore::Sums;

constexpr int kWarps = 8;

template <typename T>
__device__ void store_sum(const Sums& sums, int64_t channel, int64_t column, Accumulation<T> sum) {
#pragma unroll
  for (const auto& [data, columns] : sums.targets) {
    if (column >= 0 && column < columns) static_cast<T*>(data)[channel * columns + column] = to_storage<T>(sum);
    column -= columns;
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps) add_parts_kernel(Sums sums) {
  using A = Accumulation<T>;
  __shared__ A seen[kWarps][kWarp];
  int64_t columns = 0;
#pragma unroll
  for (const auto& target : sums.targets) columns += target.columns;
  const int64_t channel = blockIdx.x;
  for (int64_t first = 0; first < columns; first += kWarp) {
    const int64_t column = first + threadIdx.x;
    A sum = 0;
    if (column < columns) {
      const A* const from = static_cast<const A*>(sums.partial) + channel * columns + column;
      for (int64_t part = threadIdx.y; part < sums.parts; part += kWarps) sum += from[part * sums.channels * columns];
    }
    seen[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
      for (int warp = 1; warp < kWarps; ++warp) sum += seen[warp][threadIdx.x];
      store_sum<T>(sums, channel, column, sum);
    }
    __syncthreads();
  }
}

}  // namespace

namespace seemore {

void add_parts(const Sums& sums, void* stream) {
  if (sums.channels == 0) return;
  with_type(sums.dtype, [&](auto zero) {
    using T = decltype(zero);
    LAUNCH(add_parts_kernel<T>, grid_of(sums.channels, "add_parts"), dim3(kWarp, kWarps), 0, stream, sums);
  });
}

}  // namespace seemore
