// gated_ffn as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/gated_ffn.h"

#include "bindings/layer_tensors.h"

#define PARAMETERS(P)                 \
  P(Tensor, norm_weight, C)           \
  P(Tensor, norm_bias, C)             \
  P(Tensor, weight_1, 2 * C, C, 1, 1) \
  P(Tensor, bias_1, 2 * C)            \
  P(Tensor, weight_gate, C, 1, 3, 3)  \
  P(Tensor, bias_gate, C)             \
  P(Tensor, weight_2, C, C, 1, 1)     \
  P(Tensor, bias_2, C)

namespace {

using namespace seemore::bindings;

seemore::GatedFfn inputs_of(const LayerCheck& check, const Tensor& x, PARAMETERS(SEEMORE_ARGUMENT) double eps) {
  const int64_t C = x.size(1);
  return {check.is_double(), size(x), check.image("x", x, x.sizes()), PARAMETERS(SEEMORE_CHECKED) eps};
}

void gated_ffn(const Tensor& y, const Tensor& x, PARAMETERS(SEEMORE_ARGUMENT) double eps) {
  const LayerCheck check("gated_ffn", "x", x);
  const auto inputs = inputs_of(check, x, PARAMETERS(SEEMORE_VALUE) eps);
  seemore::gated_ffn(inputs, check.image("y", y, x.sizes()));
}

void gated_ffn_backward(const Tensor& dx, PARAMETERS(SEEMORE_GRADIENT) const Tensor& dy, const Tensor& x,
                        PARAMETERS(SEEMORE_ARGUMENT) double eps) {
  const LayerCheck check("gated_ffn", "x", x);
  const auto inputs = inputs_of(check, x, PARAMETERS(SEEMORE_VALUE) eps);
  const int64_t C = x.size(1);
  seemore::gated_ffn_backward(inputs, {check.image("dy", dy, x.sizes()), check.image("dx", dx, x.sizes()),
                                       PARAMETERS(SEEMORE_CHECKED_GRADIENT)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("gated_ffn(Tensor(a!) y, Tensor x, " PARAMETERS(SEEMORE_SCHEMA) "float eps) -> ()");
  m.def("gated_ffn_backward(Tensor(a!) dx, " PARAMETERS(SEEMORE_GRADIENT_SCHEMA) "Tensor dy, Tensor x, " PARAMETERS(
      SEEMORE_SCHEMA) "float eps) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("gated_ffn", TORCH_BOX(&gated_ffn));
  m.impl("gated_ffn_backward", TORCH_BOX(&gated_ffn_backward));
}
