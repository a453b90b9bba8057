// What the CUDA library tells of itself.

#include <torch/csrc/stable/library.h>

#include <string>

namespace seemore {
std::string why_not();
}

STABLE_TORCH_LIBRARY_FRAGMENT(seemore_cuda, m) { m.def("why_not() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(seemore_cuda, CompositeExplicitAutograd, m) {
  m.impl("why_not", TORCH_BOX(&seemore::why_not));
}
