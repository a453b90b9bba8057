// Parameters of norm_conv3x3 in the CPU library; formula and shapes in seemore_fast/reference/norm_conv3x3.py.
#pragma once

#include "params/layer_types.h"

namespace seemore {

struct NormConv3x3 {
  bool is_double;  // x is float64: then all is
  Size size;       // of x
  int64_t conv_channels, out_channels;
  TypedImage x;
  Parameter norm_weight, norm_bias;  // both or neither
  Parameter weight, bias;            // (D, C, 3, 3), (D)
  Parameter weight_pw, bias_pw;      // (P, D), (P); both or neither
  Activation activation;
  double eps;
};

struct NormConv3x3Gradients {
  TypedImage dy, dx;
  Parameter dnorm_weight, dnorm_bias, dweight, dbias, dweight_pw, dbias_pw;
};

void norm_conv3x3(const NormConv3x3& inputs, const TypedImage& y);
void norm_conv3x3_backward(const NormConv3x3& inputs, const NormConv3x3Gradients& gradients);

}  // namespace seemore
