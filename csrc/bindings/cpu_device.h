// The CPU as the bindings use it: names only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define SEEMORE_NAMESPACE seemore_cpu

inline constexpr const char* kDevice = "a CPU tensor";
inline constexpr bool kIsCuda = false;

inline bool is_here(const torch::stable::Tensor& x) { return x.is_cpu(); }

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream = nullptr;
};
