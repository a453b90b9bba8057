// What bindings.cpp asks of a device, where the CUDA kernels run on CPU tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define SEEMORE_NAMESPACE seemore_cuda_host
#define SEEMORE_KEY CPU

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream = nullptr;
};
