// depthwise_gate as the libraries see it; formula and shapes in seemore_fast/reference/depthwise_gate.py.
#pragma once

#include "views.h"

namespace seemore {

// Inputs of forward and backward, all of one dtype; CUDA's kernels have no float64. Weights are contiguous (C, 9),
// biases (C).
struct DepthwiseGate {
  DType dtype;
  Size size;
  Image u, g;
  const void *weight, *bias;
};

struct DepthwiseGateGradients {
  Image dy, du, dg;
  // (parts, C, 10) of the accumulation type (float32, or float64 for that): over a part of the image, for each channel
  // the weight's nine sums and the bias's
  void* partial;
};

void depthwise_gate(const DepthwiseGate& inputs, const Image& y, void* stream);
int64_t depthwise_gate_parts(const DepthwiseGate& inputs);
void depthwise_gate_backward(const DepthwiseGate& inputs, const DepthwiseGateGradients& gradients, void* stream);

}  // namespace seemore
