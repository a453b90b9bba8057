// The second stage of every gradient of weights and biases: partial sums added up over the parts of the image.
#pragma once

#include "params/views.h"

namespace seemore {

struct Sums {
  static constexpr int kMost = 4;
  struct Target {
    void* data;  // (channels, columns), contiguous, of `dtype`
    int64_t columns;
  };
  DType dtype;
  int64_t parts, channels;
  const void* partial;    // (parts, channels, the targets' columns one after another), of the accumulation type
  Target targets[kMost];  // as many as there are, then {}
};

// Each library defines it. The order of summation depends on the number of parts alone; without parts the sums are 0.
void add_parts(const Sums& sums, void* stream);

}  // namespace seemore
