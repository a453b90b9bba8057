// Instructions of a warp, of operands and with results as its lanes have them.

#include "cuda/network/lanes.h"

namespace {

template <int kInputs>
__global__ void product_kernel(const uint32_t* a, const uint32_t* b, float* sums) {
  const float none[2] = {};
  uint32_t left[kInputs / 4], right[kInputs / 8];
  float first[2], second[2];
  memcpy(left, a + threadIdx.x * (kInputs / 4), sizeof(left));
  memcpy(right, b + threadIdx.x * (kInputs / 8), sizeof(right));
  seemore::gpu::multiply_add<__nv_bfloat16, kInputs>(first, second, left, right, none, none);
  for (int i = 0; i < 2; ++i) sums[4 * threadIdx.x + i] = first[i], sums[4 * threadIdx.x + 2 + i] = second[i];
}

__global__ void matrices_kernel(const uint32_t* rows, uint32_t* words) {
  uint32_t* const to = words + 4 * threadIdx.x;
  seemore::gpu::read_matrices(to[0], to[1], to[2], to[3], rows + 4 * threadIdx.x);
}

// fma, product and tanh of pairs of float16.
__global__ void pairs_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* results) {
  const int i = threadIdx.x;
  results[3 * i] = seemore::gpu::multiply_add_pairs(a[i], b[i], c[i]);
  results[3 * i + 1] = seemore::gpu::multiply_pairs(a[i], b[i]);
  results[3 * i + 2] = seemore::gpu::hyperbolic_tangents(a[i]);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void matrices(const uint32_t* rows, uint32_t* words) {
  LAUNCH(matrices_kernel, 1, 32, 0, nullptr, rows, words);
}

extern "C" __attribute__((visibility("default"))) void pairs(const uint32_t* a, const uint32_t* b, const uint32_t* c,
                                                             uint32_t* results) {
  LAUNCH(pairs_kernel, 1, 32, 0, nullptr, a, b, c, results);
}

extern "C" __attribute__((visibility("default"))) void product(int inputs, const uint32_t* a, const uint32_t* b,
                                                               float* sums) {
  if (inputs == 16) {
    LAUNCH(product_kernel<16>, 1, 32, 0, nullptr, a, b, sums);
  } else {
    LAUNCH(product_kernel<8>, 1, 32, 0, nullptr, a, b, sums);
  }
}
