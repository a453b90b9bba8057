// A GPU as the bindings use it: names, the tensor's GPU made current, and torch's stream on it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#define SEEMORE_NAMESPACE seemore_cuda

// As shim.h has it under USE_CUDA, which a CPU build of torch lacks. (torch::stable's Stream has its cudaStream_t from
// torch 2.13 on only.)
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

inline constexpr const char* kDevice = "a CUDA tensor";
inline constexpr bool kIsCuda = true;

inline bool is_here(const torch::stable::Tensor& x) { return x.is_cuda(); }

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
