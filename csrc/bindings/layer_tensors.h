// Tensors of layers as the kernels' structs, checked: each may have a floating type of its own, as under autocast; if
// one is float64, all are.
#pragma once

#include "bindings/tensors.h"
#include "params/layer_types.h"

namespace seemore::bindings {

class LayerCheck : public Check {
 public:
  using Check::Check;

  bool is_double() const { return dtype() == DType::float64; }

  TypedImage image(const char* name, const Tensor& x, Shape shape) const {
    of_any_dtype(name, x, shape);
    return {bindings::image(x), type(name, x)};
  }

  TypedImage image(const char* name, const OptionalTensor& x, Shape shape) const {
    return x ? image(name, *x, shape) : TypedImage{};
  }

  Parameter parameter(const char* name, const Tensor& x, Shape shape) const {
    of_any_dtype(name, x, shape);
    contiguous(name, x);
    return {x.data_ptr(), type(name, x)};
  }

  Parameter parameter(const char* name, const OptionalTensor& x, Shape shape) const {
    return x ? parameter(name, *x, shape) : Parameter{};
  }

 private:
  DType type(const char* name, const Tensor& x) const {
    switch (x.scalar_type()) {
      case ScalarType::Double:
        if (is_double()) return DType::float64;
        break;
      case ScalarType::Float:
        if (!is_double()) return DType::float32;
        break;
      case ScalarType::BFloat16:
        if (!is_double()) return DType::bfloat16;
        break;
      default:
        break;
    }
    refuse(name, "has another dtype", is_double() ? "float64" : "float32 or bfloat16");
  }
};

}  // namespace seemore::bindings
