// Kernels with one fault each, and right ones beside them: does cuda_host.h show the fault? See test_cuda_host.py.
// y and x have one element for each thread of the grid.

#include <map>

#include "cuda/common/launch.h"

namespace {

using Kernel = void (*)(float* y, const float* x);

__device__ int number() { return blockIdx.x * blockDim.x + threadIdx.x; }

// The block's part of x in reverse.
template <bool kBarrier>
__global__ void reverse(float* y, const float* x) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = x[number()];
  if (kBarrier) __syncthreads();
  y[number()] = tile[blockDim.x - 1 - threadIdx.x];
}

// The next thread's element, 0 for the last thread. Without a barrier right if threads run one after another.
template <bool kBarrier>
__global__ void shift(float* y, const float* x) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = x[number()];
  __syncthreads();
  const float next = threadIdx.x + 1 < blockDim.x ? tile[threadIdx.x + 1] : 0;
  if (kBarrier) __syncthreads();
  tile[threadIdx.x] = next;
  y[number()] = tile[threadIdx.x];
}

// x through static shared memory, of which the last block writes `count` elements; read from `offset` on.
template <int kCount, int kOffset>
__global__ void copy_static(float* y, const float* x) {
  __shared__ float tile[1024];
  if (threadIdx.x < kCount || blockIdx.x + 1 < gridDim.x) tile[threadIdx.x] = x[number()];
  y[number()] = tile[threadIdx.x + kOffset];
}

template <int kCount, int kOffset>
__global__ void copy_dynamic(float* y, const float* x) {
  DYNAMIC_SHARED(float, tile);
  if (threadIdx.x < kCount || blockIdx.x + 1 < gridDim.x) tile[threadIdx.x] = x[number()];
  y[number()] = tile[threadIdx.x + kOffset];
}

template <int kOffset>
__global__ void copy_global_from(float* y, const float* x) {
  y[number()] = x[number() + kOffset];
}

template <int kOffset>
__global__ void copy_global_to(float* y, const float* x) {
  y[number() + kOffset] = x[number()];
}

template <int kFirst>
__global__ void leave(float* y, const float* x) {
  if (threadIdx.x < kFirst) return;
  __syncthreads();
  y[number()] = x[number()];
}

__global__ void diverge(float* y, const float* x) {
  if (threadIdx.x % 64 < 32) {
    y[number()] = x[number()];
    __syncthreads();
  } else {
    __syncthreads();
    y[number()] = x[number()];
  }
}

// The sum of the warp's elements, in each of its lanes: by one way in lane 0, by another in the rest.
template <int kLanes, unsigned kMask>
__global__ void warp_sum(float* y, const float* x) {
  float down = x[number()], all = down;
  if (threadIdx.x % 32 < kLanes) {
    for (int offset = 16; offset > 0; offset /= 2) down += __shfl_down_sync(kMask, down, offset);
    for (int lanes = 16; lanes > 0; lanes /= 2) all += __shfl_xor_sync(kMask, all, lanes);
  }
  y[number()] = threadIdx.x % 32 ? all : down;
}

const std::map<std::string, Kernel> kKernels = {
    {"reverse", reverse<true>},
    {"reverse without barrier", reverse<false>},
    {"shift", shift<true>},
    {"shift without barrier", shift<false>},
    {"copy_static", copy_static<1024, 0>},
    {"copy_static uninitialised", copy_static<1000, 0>},
    {"copy_static out of bounds", copy_static<1024, 1>},
    {"copy_dynamic", copy_dynamic<1024, 0>},
    {"copy_dynamic uninitialised", copy_dynamic<1000, 0>},
    {"copy_dynamic out of bounds", copy_dynamic<1024, 1>},
    {"copy_global_from", copy_global_from<0>},
    {"copy_global_from out of bounds", copy_global_from<1>},
    {"copy_global_to", copy_global_to<0>},
    {"copy_global_to out of bounds", copy_global_to<1>},
    {"leave", leave<0>},
    {"leave before a barrier", leave<1>},
    {"divergent barriers", diverge},
    {"warp_sum", warp_sum<32, 0xffffffff>},
    {"warp_sum of some lanes", warp_sum<31, 0xffffffff>},
    {"warp_sum with a mask", warp_sum<32, 0xffff>},
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* run(const char* name, float* y, const float* x,
                                                                  int blocks, int threads, int shared_bytes) {
  static std::string message;
  try {
    const Kernel kernel = kKernels.at(name);
    LAUNCH(kernel, blocks, threads, shared_bytes, nullptr, y, x);
    return nullptr;
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
}
