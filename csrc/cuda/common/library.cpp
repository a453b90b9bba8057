// The CUDA library's operators that no kernel belongs to.

#include <torch/csrc/stable/library.h>

#include <string>

namespace seemore {
std::string unsupported_reason();
}

STABLE_TORCH_LIBRARY_FRAGMENT(seemore_cuda, m) { m.def("unsupported_reason() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(seemore_cuda, CompositeExplicitAutograd, m) {
  m.impl("unsupported_reason", TORCH_BOX(&seemore::unsupported_reason));
}
