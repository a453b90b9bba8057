// The table of an instruction set's kernels; dispatch.cpp chooses between the tables.
#pragma once

#include "params/calibrate.h"
#include "params/gated_ffn.h"
#include "params/low_rank_experts.h"
#include "params/network.h"
#include "params/norm_conv3x3.h"
#include "params/norm_pointwise.h"
#include "params/router.h"
#include "params/striped_conv.h"
#include "params/striped_conv_router.h"

namespace seemore {

struct Kernels {
  const char* instruction_set;
#define KERNEL(result, name, parameters, arguments) result(*name) parameters;
#include "cpu/dispatch/kernels.def"
#undef KERNEL
};

}  // namespace seemore
