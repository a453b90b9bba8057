// striped_conv_router as an operator of a library: y is the caller's, the sums for router_from_sums are returned.

#include "params/striped_conv_router.h"

#include "bindings/striped_conv_inputs.h"

namespace {

using namespace seemore::bindings;

Tensor striped_conv_router(const Tensor& y, const Tensor& x, STRIPES(SEEMORE_ARGUMENT) bool gelu) {
  const Check check("striped_conv_router", "x", x);
  const auto inputs = striped_conv_inputs(check, x, STRIPES(SEEMORE_VALUE) gelu, std::nullopt);
  if (check.dtype() == seemore::DType::float64) check.refuse("x", "is float64", "float32, float16 or bfloat16");
  check("y", y, x.sizes());
  const int64_t parts = seemore::striped_conv_router_parts(inputs);
  const OnDevice device(x);
  const auto sums = torch::stable::new_empty(x, {parts, x.size(0), x.size(1)}, ScalarType::Float);
  seemore::striped_conv_router(inputs, image(y), static_cast<float*>(sums.data_ptr()), device.stream);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("striped_conv_router(Tensor(a!) y, Tensor x, " STRIPES(SEEMORE_SCHEMA) "bool gelu) -> Tensor");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("striped_conv_router", TORCH_BOX(&striped_conv_router));
}
