// Parameters of calibrate; formula and shapes in seemore_fast/reference/calibrate.py.
#pragma once

#include "params/views.h"

namespace seemore {

// Inputs of forward and backward, all of one dtype. Parameters are contiguous.
struct Calibrate {
  DType dtype;
  Size size;
  int64_t recursive;  // height and width are at least 4^recursive
  Image k;
  const void *weight_agg, *bias_agg, *weight_dw, *bias_dw, *weight_pw, *bias_pw;
};

// A small map, (C, B, height, width): channels outermost, so that the pixels of a batch are one row.
struct MapSize {
  int64_t channels, batch, height, width;

  int64_t elements() const { return channels * batch * height * width; }
};

// The size of aggregation number `level` (1 .. recursive), without the rows and columns that no later one reads.
inline MapSize level_size(const Calibrate& inputs, int64_t level) {
  const Size& size = inputs.size;
  const auto side = [&](int64_t pixels) { return (pixels >> 2 * inputs.recursive) << 2 * (inputs.recursive - level); };
  return {size.channels, size.batch, side(size.height), side(size.width)};
}

// Elements of `maps`, which forward leaves for backward, of the accumulation type (float32, or float64 for that): the
// sums of aggregations 1, 2, .. before GELU, and the last one's after it.
inline int64_t maps_elements(const Calibrate& inputs) {
  int64_t elements = level_size(inputs, inputs.recursive).elements();
  for (int64_t level = 1; level <= inputs.recursive; ++level) elements += level_size(inputs, level).elements();
  return elements;
}

// The further arguments of backward. Partial sums are of the accumulation type, over parts of the image; the caller
// adds them up.
struct CalibrateGradients {
  Image dy, dk;
  const void* maps;
  void* partial_agg;  // (agg_parts, C, 16 + 1): of weight_agg and bias_agg
  void* partial_mix;  // (mix_parts, C, C + 1 + 9 + 1): of weight_pw, bias_pw, weight_dw and bias_dw
  void* scratch;      // of the accumulation type, not initialised
};

struct CalibrateWorkspace {
  int64_t agg_parts, mix_parts, scratch;
};

// Each library that has the operator defines these three. `stream` is a cudaStream_t. `small` has room for one more
// map of the last one's size.
void calibrate(const Calibrate& inputs, const Image& y, void* maps, void* small, void* stream);
CalibrateWorkspace calibrate_workspace(const Calibrate& inputs);
void calibrate_backward(const Calibrate& inputs, const CalibrateGradients& gradients, void* stream);

}  // namespace seemore
