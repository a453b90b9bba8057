// The product of one instruction of a warp, of operands and with results as its lanes have them.

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

}  // namespace

extern "C" __attribute__((visibility("default"))) void product(int inputs, const uint32_t* a, const uint32_t* b,
                                                               float* sums) {
  if (inputs == 16) {
    LAUNCH(product_kernel<16>, 1, 32, 0, nullptr, a, b, sums);
  } else {
    LAUNCH(product_kernel<8>, 1, 32, 0, nullptr, a, b, sums);
  }
}
