// The kernels of one instruction set; dispatch.cpp chooses between these tables.
#pragma once

#include "striped_conv.h"

namespace seemore {

struct Kernels {
  const char* instruction_set;
  decltype(&seemore::striped_conv) striped_conv;
  decltype(&seemore::striped_conv_workspace) striped_conv_workspace;
  decltype(&seemore::striped_conv_backward) striped_conv_backward;
};

}  // namespace seemore
