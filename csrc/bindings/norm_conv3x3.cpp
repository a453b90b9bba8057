// norm_conv3x3 as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/norm_conv3x3.h"

#include "bindings/layer_tensors.h"

#define PARAMETERS(P)                        \
  P(OptionalTensor, norm_weight, C)          \
  P(OptionalTensor, norm_bias, C)            \
  P(Tensor, weight, D, C, 3, 3)              \
  P(Tensor, bias, D)                         \
  P(OptionalTensor, weight_pw, out, D, 1, 1) \
  P(OptionalTensor, bias_pw, out)

namespace {

using namespace seemore::bindings;

seemore::NormConv3x3 inputs_of(const LayerCheck& check, const Tensor& x, PARAMETERS(SEEMORE_ARGUMENT) bool gelu,
                               double eps) {
  const int64_t C = x.size(1), D = weight.dim() == 4 ? weight.size(0) : 0;
  const int64_t out = weight_pw && weight_pw->dim() == 4 ? weight_pw->size(0) : D;
  return {check.is_double(),
          size(x),
          D,
          out,
          check.image("x", x, x.sizes()),
          PARAMETERS(SEEMORE_CHECKED) activation(gelu),
          eps};
}

void norm_conv3x3(const Tensor& y, const Tensor& x, PARAMETERS(SEEMORE_ARGUMENT) bool gelu, double eps) {
  const LayerCheck check("norm_conv3x3", "x", x);
  const auto inputs = inputs_of(check, x, PARAMETERS(SEEMORE_VALUE) gelu, eps);
  seemore::norm_conv3x3(inputs, check.image("y", y, {x.size(0), inputs.out_channels, x.size(2), x.size(3)}));
}

void norm_conv3x3_backward(const Tensor& dx, PARAMETERS(SEEMORE_GRADIENT) const Tensor& dy, const Tensor& x,
                           PARAMETERS(SEEMORE_ARGUMENT) bool gelu, double eps) {
  const LayerCheck check("norm_conv3x3", "x", x);
  const auto inputs = inputs_of(check, x, PARAMETERS(SEEMORE_VALUE) gelu, eps);
  const int64_t C = x.size(1), D = inputs.conv_channels, out = inputs.out_channels;
  seemore::norm_conv3x3_backward(inputs, {check.image("dy", dy, {x.size(0), out, x.size(2), x.size(3)}),
                                          check.image("dx", dx, x.sizes()), PARAMETERS(SEEMORE_CHECKED_GRADIENT)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("norm_conv3x3(Tensor(a!) y, Tensor x, " PARAMETERS(SEEMORE_SCHEMA) "bool gelu, float eps) -> ()");
  m.def("norm_conv3x3_backward(Tensor(a!) dx, " PARAMETERS(SEEMORE_GRADIENT_SCHEMA) "Tensor dy, Tensor x, " PARAMETERS(
      SEEMORE_SCHEMA) "bool gelu, float eps) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("norm_conv3x3", TORCH_BOX(&norm_conv3x3));
  m.impl("norm_conv3x3_backward", TORCH_BOX(&norm_conv3x3_backward));
}
