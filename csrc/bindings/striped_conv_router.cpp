// striped_conv_router as an operator of a library: y is the caller's, the sums for router_from_sums are returned.

#include "params/striped_conv_router.h"

#include "bindings/striped_conv_inputs.h"

namespace {

using namespace seemore::bindings;

Tensor striped_conv_router(const Tensor& y, const Tensor& x, const Tensor& weight_row, const Tensor& bias_row,
                           const Tensor& weight_col, const Tensor& bias_col, bool gelu) {
  const Check check("striped_conv_router", "x", x);
  const auto inputs = striped_conv_inputs(check, x, weight_row, bias_row, weight_col, bias_col, gelu, std::nullopt);
  if (check.dtype() == seemore::DType::float64) check.refuse("x", "is float64", "float32, float16 or bfloat16");
  const auto [batch, channels, height, width] = size(x);
  check("y", y, {batch, channels, height, width});
  const int64_t parts = seemore::striped_conv_router_parts(inputs);
  const OnDevice device(x);
  const auto sums = torch::stable::new_empty(x, {parts, batch, channels}, ScalarType::Float);
  seemore::striped_conv_router(inputs, image(y), static_cast<float*>(sums.data_ptr()), device.stream);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "striped_conv_router(Tensor(a!) y, Tensor x, Tensor weight_row, Tensor bias_row, Tensor weight_col, "
      "Tensor bias_col, bool gelu) -> Tensor");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("striped_conv_router", TORCH_BOX(&striped_conv_router));
}
