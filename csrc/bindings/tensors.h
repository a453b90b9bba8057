// Torch's tensors as the kernels' structs, and checks for direct calls of a library's operators. (seemore_fast/ops
// checks, too, with longer messages.)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include SEEMORE_DEVICE
#include "params/sums.h"
#include "params/views.h"

// An operator's binding lists its parameters once, in their order:
//
//   #define PARAMETERS(P) P(Tensor, norm_weight, C) P(OptionalTensor, weight_pw, D, C, 1, 1) ...
//
// with the sizes of their shapes. Here is what it makes of the list: arguments of functions, and of their calls;
// checked parameters; parts of schemas; and the same of their gradients.
#define SEEMORE_ARGUMENT(type, name, ...) const type &name,
#define SEEMORE_VALUE(type, name, ...) name,
#define SEEMORE_CHECKED(type, name, ...) check.parameter(#name, name, {__VA_ARGS__}),
#define SEEMORE_SCHEMA(type, name, ...) SEEMORE_SCHEMA_OF_##type() #name ", "
#define SEEMORE_GRADIENT(type, name, ...) const type &d##name,
#define SEEMORE_CHECKED_GRADIENT(type, name, ...) check.parameter("d" #name, d##name, {__VA_ARGS__}),
#define SEEMORE_GRADIENT_SCHEMA(type, name, ...) SEEMORE_SCHEMA_OF_##type("(" #name "!)") "d" #name ", "
#define SEEMORE_SCHEMA_OF_Tensor(written) "Tensor" written " "
#define SEEMORE_SCHEMA_OF_OptionalTensor(written) "Tensor" written "? "

namespace seemore::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Image image(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

inline Image image(const OptionalTensor& x) { return x ? image(*x) : Image{}; }

inline Size size(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// A flag, because the stable ABI loses the memory of every string that an operator takes or returns (torch 2.10
// to 2.13).
inline Activation activation(bool gelu) { return gelu ? Activation::gelu : Activation::none; }

// Checks of an operator's tensors against its first one, on this library's kind of device: mostly an image (B, C, H,
// W).
class Check {
 public:
  Check(const char* op, const char* name, const Tensor& first, int64_t dimensions = 4,
        const char* shape = "(B, C, H, W)")
      : op_(op), name_(name), first_(first) {
    if (!is_here(first)) refuse(name, "is on another kind of device", kDevice);
    if (first.dim() != dimensions) {
      refuse(name, "has " + std::to_string(first.dim()) + " dimensions", std::to_string(dimensions) + ": " + shape);
    }
    dtype();
  }

  DType dtype() const {
    switch (first_.scalar_type()) {
      case ScalarType::Float:
        return DType::float32;
      case ScalarType::Double:
        return DType::float64;
      case ScalarType::Half:
        return DType::float16;
      case ScalarType::BFloat16:
        return DType::bfloat16;
      default:
        refuse(name_, "has another dtype", "float32, float64, float16 or bfloat16");
    }
  }

  // `x` has this shape, and the first one's dtype and device.
  void operator()(const char* name, const Tensor& x, Shape shape) const {
    if (x.scalar_type() != first_.scalar_type()) refuse(name, "has another dtype", std::string("that of ") + name_);
    of_any_dtype(name, x, shape);
  }

  void operator()(const char* name, const OptionalTensor& x, Shape shape) const {
    if (x) (*this)(name, *x, shape);
  }

  void of_any_dtype(const char* name, const Tensor& x, Shape shape) const {
    if (!is_here(x) || x.get_device_index() != first_.get_device_index()) {
      refuse(name, "is on another device", std::string("that of ") + name_);
    }
    const auto sizes = x.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
      refuse(name, "has shape " + text(sizes), text(shape));
    }
  }

  // A parameter, or its gradient: all that, and contiguous.
  void* parameter(const char* name, const Tensor& x, Shape shape) const {
    (*this)(name, x, shape);
    contiguous(name, x);
    return x.data_ptr();
  }

  void contiguous(const char* name, const Tensor& x) const {
    if (!x.is_contiguous()) refuse(name, "is not contiguous", "a contiguous tensor");
  }

  [[noreturn]] void refuse(const char* name, const std::string& got, const std::string& expected) const {
    throw std::runtime_error(std::string(op_) + ": " + name + " " + got + ", expected " + expected);
  }

 private:
  static std::string text(Shape sizes) {
    std::string numbers;
    for (const int64_t size : sizes) numbers += (numbers.empty() ? "" : ", ") + std::to_string(size);
    return "(" + numbers + ")";
  }

  const char *op_, *name_;
  const Tensor& first_;
};

}  // namespace seemore::bindings
