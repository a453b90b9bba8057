// gated_ffn as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/gated_ffn.h"

#include "bindings/layer_tensors.h"

namespace {

using namespace seemore::bindings;

seemore::GatedFfn inputs_of(const LayerCheck& check, const Tensor& x, const Tensor& norm_weight,
                            const Tensor& norm_bias, const Tensor& weight_1, const Tensor& bias_1,
                            const Tensor& weight_gate, const Tensor& bias_gate, const Tensor& weight_2,
                            const Tensor& bias_2, double eps) {
  const auto [batch, channels, height, width] = size(x);
  return {check.is_double(),
          size(x),
          check.image("x", x, {batch, channels, height, width}),
          check.parameter("norm_weight", norm_weight, {channels}),
          check.parameter("norm_bias", norm_bias, {channels}),
          check.parameter("weight_1", weight_1, {2 * channels, channels, 1, 1}),
          check.parameter("bias_1", bias_1, {2 * channels}),
          check.parameter("weight_gate", weight_gate, {channels, 1, 3, 3}),
          check.parameter("bias_gate", bias_gate, {channels}),
          check.parameter("weight_2", weight_2, {channels, channels, 1, 1}),
          check.parameter("bias_2", bias_2, {channels}),
          eps};
}

void gated_ffn(const Tensor& y, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
               const Tensor& weight_1, const Tensor& bias_1, const Tensor& weight_gate, const Tensor& bias_gate,
               const Tensor& weight_2, const Tensor& bias_2, double eps) {
  const LayerCheck check("gated_ffn", "x", x);
  const auto inputs =
      inputs_of(check, x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps);
  seemore::gated_ffn(inputs, check.image("y", y, {x.size(0), x.size(1), x.size(2), x.size(3)}));
}

void gated_ffn_backward(const Tensor& dx, const Tensor& dnorm_weight, const Tensor& dnorm_bias, const Tensor& dweight_1,
                        const Tensor& dbias_1, const Tensor& dweight_gate, const Tensor& dbias_gate,
                        const Tensor& dweight_2, const Tensor& dbias_2, const Tensor& dy, const Tensor& x,
                        const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight_1,
                        const Tensor& bias_1, const Tensor& weight_gate, const Tensor& bias_gate,
                        const Tensor& weight_2, const Tensor& bias_2, double eps) {
  const LayerCheck check("gated_ffn", "x", x);
  const auto inputs =
      inputs_of(check, x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps);
  const auto [batch, channels, height, width] = size(x);
  seemore::gated_ffn_backward(
      inputs,
      {check.image("dy", dy, {batch, channels, height, width}), check.image("dx", dx, {batch, channels, height, width}),
       check.parameter("dnorm_weight", dnorm_weight, {channels}), check.parameter("dnorm_bias", dnorm_bias, {channels}),
       check.parameter("dweight_1", dweight_1, {2 * channels, channels, 1, 1}),
       check.parameter("dbias_1", dbias_1, {2 * channels}),
       check.parameter("dweight_gate", dweight_gate, {channels, 1, 3, 3}),
       check.parameter("dbias_gate", dbias_gate, {channels}),
       check.parameter("dweight_2", dweight_2, {channels, channels, 1, 1}),
       check.parameter("dbias_2", dbias_2, {channels})});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "gated_ffn(Tensor(a!) y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight_1, Tensor bias_1, "
      "Tensor weight_gate, Tensor bias_gate, Tensor weight_2, Tensor bias_2, float eps) -> ()");
  m.def(
      "gated_ffn_backward(Tensor(a!) dx, Tensor(b!) dnorm_weight, Tensor(c!) dnorm_bias, Tensor(d!) dweight_1, "
      "Tensor(e!) dbias_1, Tensor(f!) dweight_gate, Tensor(g!) dbias_gate, Tensor(h!) dweight_2, Tensor(i!) dbias_2, "
      "Tensor dy, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight_1, Tensor bias_1, "
      "Tensor weight_gate, Tensor bias_gate, Tensor weight_2, Tensor bias_2, float eps) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("gated_ffn", TORCH_BOX(&gated_ffn));
  m.impl("gated_ffn_backward", TORCH_BOX(&gated_ffn_backward));
}
