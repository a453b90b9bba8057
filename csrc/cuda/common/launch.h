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

// An attribute of the current device, which is asked once. Legal during a capture.
template <cudaDeviceAttr kAttribute>
int device_attribute(const char* name) {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kMostDevices) value = known[device];
  if (error == cudaSuccess && value == 0) {
    error = cudaDeviceGetAttribute(&value, kAttribute, device);
    if (error == cudaSuccess && device < kMostDevices) known[device] = value;
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  return value;
}

inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>("multiprocessors"); }

// Bytes that a block can have, and that all blocks of a multiprocessor have.
inline int most_shared_bytes() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>("shared memory of a block");
}
inline int shared_bytes_of_multiprocessor() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>("shared memory");
}

template <typename Kernel>
void allow_shared(Kernel* kernel, int64_t bytes, const char* name) {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(bytes));
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// Between the GPU's memory and the host's, in the order of the stream.
inline void copy_async(void* to, const void* from, int64_t bytes, void* stream) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string("copy: ") + cudaGetErrorString(error));
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

// A launch with more than the 48 KB of shared memory that every block can have.
#define LAUNCH_LARGE(kernel, grid, block, shared_bytes, stream, ...) \
  do {                                                               \
    allow_shared(kernel, shared_bytes, #kernel);                     \
    LAUNCH(kernel, grid, block, shared_bytes, stream, __VA_ARGS__);  \
  } while (0)

// A one-dimensional grid, the only dimension in which millions of blocks fit.
inline unsigned grid_of(int64_t blocks, const char* kernel) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(kernel) + ": a grid of " + std::to_string(blocks) +
                             " blocks, expected at most " + std::to_string(INT32_MAX));
  }
  return static_cast<unsigned>(blocks);
}
