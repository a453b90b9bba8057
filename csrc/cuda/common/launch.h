// Launches of kernels, and their shared memory. Macros, so that the very same kernels also run on the CPU:
// a host compiler finds its own LAUNCH and DYNAMIC_SHARED, threads, barriers and shuffles in tests/helpers/cuda_host.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Of the current device, which is asked once. Legal during a capture.
inline int multiprocessors() {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kMostDevices) count = known[device];
  if (error == cudaSuccess && count == 0) {
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && device < kMostDevices) known[device] = count;
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("multiprocessors: ") + cudaGetErrorString(error));
  return count;
}

// A kernel with commas in its name goes in parentheses.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                   \
  do {                                                                                           \
    kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    check_launch(#kernel);                                                                       \
  } while (0)

// `name` points to the launch's shared_bytes.
#define DYNAMIC_SHARED(type, name)                                       \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_memory)

#else
#include "cuda_host.h"
#endif

// A one-dimensional grid, the only dimension in which millions of blocks fit.
inline unsigned grid_of(int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(kernel) + ": a grid of " + std::to_string(blocks) +
                             " blocks, expected at most " + std::to_string(INT32_MAX));
  }
  return static_cast<unsigned>(blocks);
}
