// striped_conv whose result is pooled on its way; formula and shapes in seemore_fast/reference/striped_conv_router.py.
#pragma once

#include "params/striped_conv.h"

namespace seemore {

// How many parts an image's sums come in.
int64_t striped_conv_router_parts(const StripedConv& inputs);
// Writes y and (parts, B, C) sums of y as it was rounded. For 3, 7 and 11 taps, not in float64.
void striped_conv_router(const StripedConv& inputs, const Image& y, float* sums, void* stream);

}  // namespace seemore
