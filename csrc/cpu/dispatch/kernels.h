// The table of an instruction set's kernels; dispatch.cpp chooses between the tables.
#pragma once

#define KERNEL(result, name, parameters, arguments)
#include "cpu/dispatch/kernels.def"
#undef KERNEL

namespace seemore {

struct Kernels {
  const char* instruction_set;
#define KERNEL(result, name, parameters, arguments) result(*name) parameters;
#include "cpu/dispatch/kernels.def"
#undef KERNEL
};

}  // namespace seemore
