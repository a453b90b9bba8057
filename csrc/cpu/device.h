// What bindings.cpp asks of a device: on the CPU, nothing but its names.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define SEEMORE_NAMESPACE seemore_cpu
#define SEEMORE_KEY CPU

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream = nullptr;
};
