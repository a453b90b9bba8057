// Compiled once per instruction set, as the kernels themselves are.

#include "kernels.h"

#define SEEMORE_NAME_(isa) #isa
#define SEEMORE_NAME(isa) SEEMORE_NAME_(isa)

namespace seemore::SEEMORE_ISA {

decltype(seemore::striped_conv) striped_conv;
decltype(seemore::striped_conv_workspace) striped_conv_workspace;
decltype(seemore::striped_conv_backward) striped_conv_backward;

extern const Kernels kernels;
const Kernels kernels{SEEMORE_NAME(SEEMORE_ISA), striped_conv, striped_conv_workspace, striped_conv_backward};

}  // namespace seemore::SEEMORE_ISA
