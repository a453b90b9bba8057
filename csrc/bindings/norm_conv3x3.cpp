// norm_conv3x3 as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/norm_conv3x3.h"

#include "bindings/layer_tensors.h"

namespace {

using namespace seemore::bindings;
using OptionalTensor = std::optional<Tensor>;

seemore::NormConv3x3 inputs_of(const LayerCheck& check, const Tensor& x, const OptionalTensor& norm_weight,
                               const OptionalTensor& norm_bias, const Tensor& weight, const Tensor& bias,
                               const OptionalTensor& weight_pw, const OptionalTensor& bias_pw, bool gelu, double eps) {
  const auto [batch, channels, height, width] = size(x);
  const int64_t rows = weight.dim() == 4 ? weight.size(0) : 0;
  const int64_t out = weight_pw && weight_pw->dim() == 4 ? weight_pw->size(0) : rows;
  return {check.is_double(),
          size(x),
          rows,
          out,
          check.image("x", x, {batch, channels, height, width}),
          check.parameter("norm_weight", norm_weight, {channels}),
          check.parameter("norm_bias", norm_bias, {channels}),
          check.parameter("weight", weight, {rows, channels, 3, 3}),
          check.parameter("bias", bias, {rows}),
          check.parameter("weight_pw", weight_pw, {out, rows, 1, 1}),
          check.parameter("bias_pw", bias_pw, {out}),
          activation(gelu),
          eps};
}

void norm_conv3x3(const Tensor& y, const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                  const Tensor& weight, const Tensor& bias, const OptionalTensor& weight_pw,
                  const OptionalTensor& bias_pw, bool gelu, double eps) {
  const LayerCheck check("norm_conv3x3", "x", x);
  const auto inputs = inputs_of(check, x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, gelu, eps);
  seemore::norm_conv3x3(inputs, check.image("y", y, {x.size(0), inputs.out_channels, x.size(2), x.size(3)}));
}

void norm_conv3x3_backward(const Tensor& dx, const OptionalTensor& dnorm_weight, const OptionalTensor& dnorm_bias,
                           const Tensor& dweight, const Tensor& dbias, const OptionalTensor& dweight_pw,
                           const OptionalTensor& dbias_pw, const Tensor& dy, const Tensor& x,
                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& weight,
                           const Tensor& bias, const OptionalTensor& weight_pw, const OptionalTensor& bias_pw,
                           bool gelu, double eps) {
  const LayerCheck check("norm_conv3x3", "x", x);
  const auto inputs = inputs_of(check, x, norm_weight, norm_bias, weight, bias, weight_pw, bias_pw, gelu, eps);
  const auto [batch, channels, height, width] = size(x);
  const int64_t rows = inputs.conv_channels, out = inputs.out_channels;
  seemore::norm_conv3x3_backward(
      inputs,
      {check.image("dy", dy, {batch, out, height, width}), check.image("dx", dx, {batch, channels, height, width}),
       check.parameter("dnorm_weight", dnorm_weight, {channels}), check.parameter("dnorm_bias", dnorm_bias, {channels}),
       check.parameter("dweight", dweight, {rows, channels, 3, 3}), check.parameter("dbias", dbias, {rows}),
       check.parameter("dweight_pw", dweight_pw, {out, rows, 1, 1}), check.parameter("dbias_pw", dbias_pw, {out})});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "norm_conv3x3(Tensor(a!) y, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, "
      "Tensor? weight_pw, Tensor? bias_pw, bool gelu, float eps) -> ()");
  m.def(
      "norm_conv3x3_backward(Tensor(a!) dx, Tensor(b!)? dnorm_weight, Tensor(c!)? dnorm_bias, Tensor(d!) dweight, "
      "Tensor(e!) dbias, Tensor(f!)? dweight_pw, Tensor(g!)? dbias_pw, Tensor dy, Tensor x, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor weight, Tensor bias, Tensor? weight_pw, Tensor? bias_pw, bool gelu, "
      "float eps) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("norm_conv3x3", TORCH_BOX(&norm_conv3x3));
  m.impl("norm_conv3x3_backward", TORCH_BOX(&norm_conv3x3_backward));
}
