// Parameters of striped_conv; formula and shapes in seemore_fast/reference/striped_conv.py.
#pragma once

#include "params/views.h"

namespace seemore {

// Inputs of forward and backward, all of one dtype. Weights are contiguous (C, K), biases (C).
struct StripedConv {
  DType dtype;
  Size size;
  int64_t taps;  // K, odd
  Activation activation;
  Image x, gate;  // gate: optional
  const void *weight_row, *bias_row, *weight_col, *bias_col;
};

// The further arguments of backward. `dgate` is there if and only if `gate` is.
struct StripedConvGradients {
  Image dy, dx, dgate;
  // (parts, C, 2K + 2) of the accumulation type (float32, or float64 for that): sums over a part of the image, for
  // each channel weight_row's K, bias_row's, weight_col's K and bias_col's. The caller adds the parts up, so that
  // the order of summation never depends on threads. Every element is written.
  void* partial;
  void* scratch;  // of the accumulation type, not initialised
};

struct StripedConvWorkspace {
  int64_t parts;    // first size of `partial`
  int64_t scratch;  // elements of `scratch`
};

// Each library defines these three. `stream` is a cudaStream_t, null on the CPU.
void striped_conv(const StripedConv& inputs, const Image& y, void* stream);
StripedConvWorkspace striped_conv_workspace(const StripedConv& inputs);
void striped_conv_backward(const StripedConv& inputs, const StripedConvGradients& gradients, void* stream);

}  // namespace seemore
