// striped_conv's tensors as the kernels' struct, checked: shared by the operators that have them.
#pragma once

#include "bindings/tensors.h"
#include "params/striped_conv.h"

namespace seemore::bindings {

inline StripedConv striped_conv_inputs(const Check& check, const Tensor& x, const Tensor& weight_row,
                                       const Tensor& bias_row, const Tensor& weight_col, const Tensor& bias_col,
                                       bool gelu, const std::optional<Tensor>& gate) {
  const auto [batch, channels, height, width] = size(x);
  const int64_t taps = weight_row.dim() == 4 ? weight_row.size(3) : 0;
  if (kIsCuda ? taps != 3 && taps != 7 && taps != 11 : taps % 2 == 0) {
    check.refuse("weight_row", "has " + std::to_string(taps) + " taps", kIsCuda ? "3, 7 or 11" : "an odd number");
  }
  if (kIsCuda && check.dtype() == DType::float64) check.refuse("x", "is float64", "float32, float16 or bfloat16");
  check.parameter("weight_row", weight_row, {channels, 1, 1, taps});
  check.parameter("bias_row", bias_row, {channels});
  check.parameter("weight_col", weight_col, {channels, 1, taps, 1});
  check.parameter("bias_col", bias_col, {channels});
  check("gate", gate, {batch, channels, height, width});
  return {check.dtype(),
          size(x),
          taps,
          activation(gelu),
          image(x),
          image(gate),
          weight_row.data_ptr(),
          bias_row.data_ptr(),
          weight_col.data_ptr(),
          bias_col.data_ptr()};
}

}  // namespace seemore::bindings
