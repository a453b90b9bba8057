// striped_conv's tensors as the kernels' struct, checked: shared by the operators that have them.
#pragma once

#include "bindings/tensors.h"
#include "params/striped_conv.h"

#define STRIPES(P)                     \
  P(Tensor, weight_row, C, 1, 1, taps) \
  P(Tensor, bias_row, C)               \
  P(Tensor, weight_col, C, 1, taps, 1) \
  P(Tensor, bias_col, C)

namespace seemore::bindings {

inline StripedConv striped_conv_inputs(const Check& check, const Tensor& x, STRIPES(SEEMORE_ARGUMENT) bool gelu,
                                       const OptionalTensor& gate) {
  const int64_t C = x.size(1), taps = weight_row.dim() == 4 ? weight_row.size(3) : 0;
  if (kIsCuda ? taps != 3 && taps != 7 && taps != 11 : taps % 2 == 0) {
    check.refuse("weight_row", "has " + std::to_string(taps) + " taps", kIsCuda ? "3, 7 or 11" : "an odd number");
  }
  if (kIsCuda && check.dtype() == DType::float64) check.refuse("x", "is float64", "float32, float16 or bfloat16");
  check("gate", gate, x.sizes());
  return {check.dtype(), size(x), taps, activation(gelu), image(x), image(gate), STRIPES(SEEMORE_CHECKED)};
}

}  // namespace seemore::bindings
