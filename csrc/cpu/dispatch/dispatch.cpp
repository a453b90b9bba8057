// Dispatch to the kernels of one of the instruction sets that they were compiled for.
//
// SEEMORE_INSTRUCTION_SETS is a list X(name) ..., best last, of the namespaces that hold a build of every kernel.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch/kernels.h"
#include "cpu/tile/parallel.h"

namespace seemore {

#define X(name)                 \
  namespace name {              \
  extern const Kernels kernels; \
  }
SEEMORE_INSTRUCTION_SETS
#undef X

namespace {

bool runs_here(const std::string& instruction_set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (instruction_set == "avx2") return avx2;
  if (instruction_set == "avx512") return avx512;
  if (instruction_set == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return instruction_set == "portable";
}

// The tables of the instruction sets that run here, best last.
const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> tables;
#define X(name) \
  if (runs_here(#name)) tables.push_back(&name::kernels);
    SEEMORE_INSTRUCTION_SETS
#undef X
    return tables;
  }();
  return found;
}

const Kernels* chosen = usable().back();

std::string instruction_sets() {
  std::string names;
  for (const Kernels* kernels : usable()) names += (names.empty() ? "" : " ") + std::string(kernels->instruction_set);
  return names;
}

// An instruction set is its index in instruction_sets(): strings lose memory (bindings/tensors.h).
int64_t instruction_set() { return std::find(usable().begin(), usable().end(), chosen) - usable().begin(); }

void use_instruction_set(int64_t index) {
  const int64_t count = usable().size();
  if (index < 0 || index >= count) {
    throw std::runtime_error("instruction set " + std::to_string(index) + " of " + instruction_sets() +
                             ", expected 0 to " + std::to_string(count - 1));
  }
  chosen = usable()[index];
}

// For the tests: an exception from the middle of a parallel loop of `count` must reach Python.
void throw_in_parallel(int64_t count, int64_t at) {
  parallel_for(
      count,
      [](const void* at, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (i == *static_cast<const int64_t*>(at)) throw std::runtime_error("thrown at " + std::to_string(i));
        }
      },
      &at);
}

}  // namespace

#define KERNEL(result, name, parameters, arguments) \
  result name parameters { return chosen->name arguments; }
#include "cpu/dispatch/kernels.def"
#undef KERNEL

}  // namespace seemore

STABLE_TORCH_LIBRARY_FRAGMENT(seemore_cpu, m) {
  m.def("instruction_sets() -> str");
  m.def("instruction_set() -> int");
  m.def("use_instruction_set(int index) -> ()");
  m.def("throw_in_parallel(int count, int at) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seemore_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&seemore::instruction_sets));
  m.impl("instruction_set", TORCH_BOX(&seemore::instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&seemore::use_instruction_set));
  m.impl("throw_in_parallel", TORCH_BOX(&seemore::throw_in_parallel));
}
