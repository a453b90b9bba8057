// depthwise_gate as an operator of a library. Results are written to tensors that the caller allocated.

#include "depthwise_gate.h"

#include "tensors.h"

namespace {

using namespace seemore::bindings;

seemore::DepthwiseGate inputs_of(const Check& check, const Tensor& u, const Tensor& g, const Tensor& weight,
                                 const Tensor& bias) {
  const auto [batch, channels, height, width] = size(u);
  if (kIsCuda && check.dtype() == seemore::DType::float64) {
    check.refuse("u", "is float64", "float32, float16 or bfloat16");
  }
  check("g", g, {batch, channels, height, width});
  check.parameter("weight", weight, {channels, 1, 3, 3});
  check.parameter("bias", bias, {channels});
  return {check.dtype(), size(u), image(u), image(g), weight.data_ptr(), bias.data_ptr()};
}

void depthwise_gate(const Tensor& y, const Tensor& u, const Tensor& g, const Tensor& weight, const Tensor& bias) {
  const Check check("depthwise_gate", "u", u);
  const auto inputs = inputs_of(check, u, g, weight, bias);
  check("y", y, {u.size(0), u.size(1), u.size(2), u.size(3)});
  const OnDevice device(u);
  seemore::depthwise_gate(inputs, image(y), device.stream);
}

void depthwise_gate_backward(const Tensor& du, const Tensor& dg, const Tensor& dweight, const Tensor& dbias,
                             const Tensor& dy, const Tensor& u, const Tensor& g, const Tensor& weight,
                             const Tensor& bias) {
  const Check check("depthwise_gate", "u", u);
  const auto inputs = inputs_of(check, u, g, weight, bias);
  const auto [batch, channels, height, width] = size(u);
  check("dy", dy, {batch, channels, height, width});
  check("du", du, {batch, channels, height, width});
  check("dg", dg, {batch, channels, height, width});
  check.parameter("dweight", dweight, {channels, 1, 3, 3});
  check.parameter("dbias", dbias, {channels});
  const OnDevice device(u);
  const int64_t parts = seemore::depthwise_gate_parts(inputs);
  const auto partial = torch::stable::new_empty(u, {parts, channels, 10}, accumulation_type(u));
  seemore::depthwise_gate_backward(inputs, {image(dy), image(du), image(dg), partial.data_ptr()}, device.stream);
  seemore::add_parts(
      {check.dtype(), parts, channels, partial.data_ptr(), {{dweight.data_ptr(), 9}, {dbias.data_ptr(), 1}}},
      device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("depthwise_gate(Tensor(a!) y, Tensor u, Tensor g, Tensor weight, Tensor bias) -> ()");
  m.def(
      "depthwise_gate_backward(Tensor(a!) du, Tensor(b!) dg, Tensor(c!) dweight, Tensor(d!) dbias, Tensor dy, "
      "Tensor u, Tensor g, Tensor weight, Tensor bias) -> ()");
}

// For tensors of every device, so that it is Check that refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("depthwise_gate", TORCH_BOX(&depthwise_gate));
  m.impl("depthwise_gate_backward", TORCH_BOX(&depthwise_gate_backward));
}
