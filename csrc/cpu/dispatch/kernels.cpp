// The table of one instruction set's kernels, compiled once per instruction set as the kernels themselves are.

#include "cpu/dispatch/kernels.h"

#define SEEMORE_NAME_(isa) #isa
#define SEEMORE_NAME(isa) SEEMORE_NAME_(isa)

namespace seemore::SEEMORE_ISA {

#define KERNEL(result, name, parameters, arguments) result name parameters;
#include "cpu/dispatch/kernels.def"
#undef KERNEL

extern const Kernels kernels;
const Kernels kernels{
    SEEMORE_NAME(SEEMORE_ISA),
#define KERNEL(result, name, parameters, arguments) name,
#include "cpu/dispatch/kernels.def"
#undef KERNEL
};

}  // namespace seemore::SEEMORE_ISA
