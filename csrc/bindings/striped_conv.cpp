// striped_conv as an operator of a library. Results are written to tensors that the caller allocated.

#include "bindings/striped_conv_inputs.h"

namespace {

using namespace seemore::bindings;

void striped_conv(const Tensor& y, const Tensor& x, STRIPES(SEEMORE_ARGUMENT) bool gelu, const OptionalTensor& gate) {
  const Check check("striped_conv", "x", x);
  const auto inputs = striped_conv_inputs(check, x, STRIPES(SEEMORE_VALUE) gelu, gate);
  check("y", y, x.sizes());
  const OnDevice device(x);
  seemore::striped_conv(inputs, image(y), device.stream);
}

void striped_conv_backward(const Tensor& dx, const OptionalTensor& dgate, STRIPES(SEEMORE_GRADIENT) const Tensor& dy,
                           const Tensor& x, STRIPES(SEEMORE_ARGUMENT) bool gelu, const OptionalTensor& gate) {
  const Check check("striped_conv", "x", x);
  const auto inputs = striped_conv_inputs(check, x, STRIPES(SEEMORE_VALUE) gelu, gate);
  const int64_t C = x.size(1), taps = inputs.taps;
  check("dy", dy, x.sizes());
  check("dx", dx, x.sizes());
  check("dgate", dgate, x.sizes());
  if (dgate.has_value() != gate.has_value()) check.refuse("dgate", "does not go with gate", "both or none");
  void* const gradients[] = {STRIPES(SEEMORE_CHECKED_GRADIENT)};
  const OnDevice device(x);
  const auto workspace = seemore::striped_conv_workspace(inputs);
  const auto partial = torch::stable::new_empty(x, {workspace.parts, C, 2 * taps + 2}, accumulation_type(x));
  const auto scratch = torch::stable::new_empty(x, {workspace.scratch}, accumulation_type(x));
  void* const sums = partial.data_ptr();
  seemore::striped_conv_backward(inputs, {image(dy), image(dx), image(dgate), sums, scratch.data_ptr()}, device.stream);
  seemore::add_parts({check.dtype(),
                      workspace.parts,
                      C,
                      sums,
                      {{gradients[0], taps}, {gradients[1], 1}, {gradients[2], taps}, {gradients[3], 1}}},
                     device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("striped_conv(Tensor(a!) y, Tensor x, " STRIPES(SEEMORE_SCHEMA) "bool gelu, Tensor? gate) -> ()");
  m.def("striped_conv_backward(Tensor(a!) dx, Tensor(b!)? dgate, " STRIPES(
      SEEMORE_GRADIENT_SCHEMA) "Tensor dy, Tensor x, " STRIPES(SEEMORE_SCHEMA) "bool gelu, Tensor? gate) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("striped_conv", TORCH_BOX(&striped_conv));
  m.impl("striped_conv_backward", TORCH_BOX(&striped_conv_backward));
}
