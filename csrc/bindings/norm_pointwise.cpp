// norm_pointwise as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/norm_pointwise.h"

#include "bindings/layer_tensors.h"

#define PARAMETERS(P)               \
  P(OptionalTensor, norm_weight, C) \
  P(OptionalTensor, norm_bias, C)   \
  P(Tensor, weight, D, C, 1, 1)     \
  P(Tensor, bias, D)

namespace {

using namespace seemore::bindings;

seemore::NormPointwise inputs_of(const LayerCheck& check, const Tensor& x, PARAMETERS(SEEMORE_ARGUMENT) bool gelu,
                                 double eps) {
  const int64_t C = x.size(1), D = weight.dim() == 4 ? weight.size(0) : 0;
  return {
      check.is_double(), size(x), D, check.image("x", x, x.sizes()), PARAMETERS(SEEMORE_CHECKED) activation(gelu), eps};
}

void norm_pointwise(const Tensor& y, const Tensor& x, PARAMETERS(SEEMORE_ARGUMENT) bool gelu, double eps,
                    const OptionalTensor& residual) {
  const LayerCheck check("norm_pointwise", "x", x);
  const auto inputs = inputs_of(check, x, PARAMETERS(SEEMORE_VALUE) gelu, eps);
  const auto shape = {x.size(0), inputs.out_channels, x.size(2), x.size(3)};
  seemore::norm_pointwise(inputs, check.image("residual", residual, shape), check.image("y", y, shape));
}

void norm_pointwise_backward(const Tensor& dx, PARAMETERS(SEEMORE_GRADIENT) const Tensor& dy, const Tensor& x,
                             PARAMETERS(SEEMORE_ARGUMENT) bool gelu, double eps) {
  const LayerCheck check("norm_pointwise", "x", x);
  const auto inputs = inputs_of(check, x, PARAMETERS(SEEMORE_VALUE) gelu, eps);
  const int64_t C = x.size(1), D = inputs.out_channels;
  seemore::norm_pointwise_backward(inputs, {check.image("dy", dy, {x.size(0), D, x.size(2), x.size(3)}),
                                            check.image("dx", dx, x.sizes()), PARAMETERS(SEEMORE_CHECKED_GRADIENT)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("norm_pointwise(Tensor(a!) y, Tensor x, " PARAMETERS(
      SEEMORE_SCHEMA) "bool gelu, float eps, Tensor? residual) -> ()");
  m.def("norm_pointwise_backward(Tensor(a!) dx, " PARAMETERS(
      SEEMORE_GRADIENT_SCHEMA) "Tensor dy, Tensor x, " PARAMETERS(SEEMORE_SCHEMA) "bool gelu, float eps) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("norm_pointwise", TORCH_BOX(&norm_pointwise));
  m.impl("norm_pointwise_backward", TORCH_BOX(&norm_pointwise_backward));
}
