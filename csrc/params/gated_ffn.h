// Parameters of gated_ffn in the CPU library; formula and shapes in seemore_fast/reference/gated_ffn.py.
#pragma once

#include "params/layer_types.h"

namespace seemore {

struct GatedFfn {
  bool is_double;  // x is float64: then all is
  Size size;
  TypedImage x;
  Parameter norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2;
  double eps;
};

struct GatedFfnGradients {
  TypedImage dy, dx;
  Parameter dnorm_weight, dnorm_bias, dweight_1, dbias_1, dweight_gate, dbias_gate, dweight_2, dbias_2;
};

void gated_ffn(const GatedFfn& inputs, const TypedImage& y);
void gated_ffn_backward(const GatedFfn& inputs, const GatedFfnGradients& gradients);

}  // namespace seemore
