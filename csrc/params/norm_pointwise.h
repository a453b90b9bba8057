// Parameters of norm_pointwise in the CPU library; formula and shapes in seemore_fast/reference/norm_pointwise.py.
#pragma once

#include "params/layer_types.h"

namespace seemore {

struct NormPointwise {
  bool is_double;  // x is float64: then all is
  Size size;       // of x
  int64_t out_channels;
  TypedImage x;
  Parameter norm_weight, norm_bias;  // both or neither
  Parameter weight, bias;            // (D, C), (D)
  Activation activation;
  double eps;
};

struct NormPointwiseGradients {
  TypedImage dy, dx;
  Parameter dnorm_weight, dnorm_bias, dweight, dbias;
};

void norm_pointwise(const NormPointwise& inputs, const TypedImage& residual, const TypedImage& y);
void norm_pointwise_backward(const NormPointwise& inputs, const NormPointwiseGradients& gradients);

}  // namespace seemore
