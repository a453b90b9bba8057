// striped_conv as an operator of a library. Results are written to tensors that the caller allocated.

#include "bindings/striped_conv_inputs.h"

namespace {

using namespace seemore::bindings;

void striped_conv(const Tensor& y, const Tensor& x, const Tensor& weight_row, const Tensor& bias_row,
                  const Tensor& weight_col, const Tensor& bias_col, bool gelu, const std::optional<Tensor>& gate) {
  const Check check("striped_conv", "x", x);
  const auto inputs = striped_conv_inputs(check, x, weight_row, bias_row, weight_col, bias_col, gelu, gate);
  check("y", y, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const OnDevice device(x);
  seemore::striped_conv(inputs, image(y), device.stream);
}

void striped_conv_backward(const Tensor& dx, const std::optional<Tensor>& dgate, const Tensor& dweight_row,
                           const Tensor& dbias_row, const Tensor& dweight_col, const Tensor& dbias_col,
                           const Tensor& dy, const Tensor& x, const Tensor& weight_row, const Tensor& bias_row,
                           const Tensor& weight_col, const Tensor& bias_col, bool gelu,
                           const std::optional<Tensor>& gate) {
  const Check check("striped_conv", "x", x);
  const auto inputs = striped_conv_inputs(check, x, weight_row, bias_row, weight_col, bias_col, gelu, gate);
  const auto [batch, channels, height, width] = size(x);
  const int64_t taps = inputs.taps;
  check("dy", dy, {batch, channels, height, width});
  check("dx", dx, {batch, channels, height, width});
  check("dgate", dgate, {batch, channels, height, width});
  if (dgate.has_value() != gate.has_value()) check.refuse("dgate", "does not go with gate", "both or none");
  check.parameter("dweight_row", dweight_row, {channels, 1, 1, taps});
  check.parameter("dbias_row", dbias_row, {channels});
  check.parameter("dweight_col", dweight_col, {channels, 1, taps, 1});
  check.parameter("dbias_col", dbias_col, {channels});
  const OnDevice device(x);
  const auto workspace = seemore::striped_conv_workspace(inputs);
  const auto partial = torch::stable::new_empty(x, {workspace.parts, channels, 2 * taps + 2}, accumulation_type(x));
  const auto scratch = torch::stable::new_empty(x, {workspace.scratch}, accumulation_type(x));
  seemore::striped_conv_backward(inputs, {image(dy), image(dx), image(dgate), partial.data_ptr(), scratch.data_ptr()},
                                 device.stream);
  seemore::add_parts({check.dtype(),
                      workspace.parts,
                      channels,
                      partial.data_ptr(),
                      {{dweight_row.data_ptr(), taps},
                       {dbias_row.data_ptr(), 1},
                       {dweight_col.data_ptr(), taps},
                       {dbias_col.data_ptr(), 1}}},
                     device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "striped_conv(Tensor(a!) y, Tensor x, Tensor weight_row, Tensor bias_row, Tensor weight_col, Tensor bias_col, "
      "bool gelu, Tensor? gate) -> ()");
  m.def(
      "striped_conv_backward(Tensor(a!) dx, Tensor(b!)? dgate, Tensor(c!) dweight_row, Tensor(d!) dbias_row, "
      "Tensor(e!) dweight_col, Tensor(f!) dbias_col, Tensor dy, Tensor x, Tensor weight_row, Tensor bias_row, "
      "Tensor weight_col, Tensor bias_col, bool gelu, Tensor? gate) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("striped_conv", TORCH_BOX(&striped_conv));
  m.impl("striped_conv_backward", TORCH_BOX(&striped_conv_backward));
}
