// striped_conv whose result is pooled as it is written; formula and shapes in
// seemore_fast/reference/striped_conv_router.py.
#pragma once

#include "params/striped_conv.h"

namespace seemore {

// The number of parts of an image's sums.
int64_t striped_conv_router_parts(const StripedConv& inputs);
// Writes y and (parts, B, C) sums of y as it was rounded. For 3, 7 and 11 taps, not in float64.
void striped_conv_router(const StripedConv& inputs, const Image& y, float* sums, void* stream);

}  // namespace seemore
