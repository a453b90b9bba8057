// norm_pointwise as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/norm_pointwise.h"

#include "bindings/layer_tensors.h"

namespace {

using namespace seemore::bindings;
using OptionalTensor = std::optional<Tensor>;

seemore::NormPointwise inputs_of(const LayerCheck& check, const Tensor& x, const OptionalTensor& norm_weight,
                                 const OptionalTensor& norm_bias, const Tensor& weight, const Tensor& bias, bool gelu,
                                 double eps) {
  const auto [batch, channels, height, width] = size(x);
  const int64_t rows = weight.dim() == 4 ? weight.size(0) : 0;
  return {check.is_double(),
          size(x),
          rows,
          check.image("x", x, {batch, channels, height, width}),
          check.parameter("norm_weight", norm_weight, {channels}),
          check.parameter("norm_bias", norm_bias, {channels}),
          check.parameter("weight", weight, {rows, channels, 1, 1}),
          check.parameter("bias", bias, {rows}),
          activation(gelu),
          eps};
}

void norm_pointwise(const Tensor& y, const Tensor& x, const OptionalTensor& norm_weight,
                    const OptionalTensor& norm_bias, const Tensor& weight, const Tensor& bias, bool gelu, double eps,
                    const OptionalTensor& residual) {
  const LayerCheck check("norm_pointwise", "x", x);
  const auto inputs = inputs_of(check, x, norm_weight, norm_bias, weight, bias, gelu, eps);
  const auto shape = {x.size(0), inputs.out_channels, x.size(2), x.size(3)};
  seemore::norm_pointwise(inputs, check.image("residual", residual, shape), check.image("y", y, shape));
}

void norm_pointwise_backward(const Tensor& dx, const OptionalTensor& dnorm_weight, const OptionalTensor& dnorm_bias,
                             const Tensor& dweight, const Tensor& dbias, const Tensor& dy, const Tensor& x,
                             const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& weight,
                             const Tensor& bias, bool gelu, double eps) {
  const LayerCheck check("norm_pointwise", "x", x);
  const auto inputs = inputs_of(check, x, norm_weight, norm_bias, weight, bias, gelu, eps);
  const auto [batch, channels, height, width] = size(x);
  const int64_t rows = inputs.out_channels;
  seemore::norm_pointwise_backward(
      inputs,
      {check.image("dy", dy, {batch, rows, height, width}), check.image("dx", dx, {batch, channels, height, width}),
       check.parameter("dnorm_weight", dnorm_weight, {channels}), check.parameter("dnorm_bias", dnorm_bias, {channels}),
       check.parameter("dweight", dweight, {rows, channels, 1, 1}), check.parameter("dbias", dbias, {rows})});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "norm_pointwise(Tensor(a!) y, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, "
      "bool gelu, float eps, Tensor? residual) -> ()");
  m.def(
      "norm_pointwise_backward(Tensor(a!) dx, Tensor(b!)? dnorm_weight, Tensor(c!)? dnorm_bias, Tensor(d!) dweight, "
      "Tensor(e!) dbias, Tensor dy, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor bias, "
      "bool gelu, float eps) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("norm_pointwise", TORCH_BOX(&norm_pointwise));
  m.impl("norm_pointwise_backward", TORCH_BOX(&norm_pointwise_backward));
}
