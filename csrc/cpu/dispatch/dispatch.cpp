// The instruction sets that the kernels were compiled for, and the choice between them.
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

void striped_conv(const StripedConv& inputs, const Image& y, void* stream) { chosen->striped_conv(inputs, y, stream); }

StripedConvWorkspace striped_conv_workspace(const StripedConv& inputs) {
  return chosen->striped_conv_workspace(inputs);
}

void striped_conv_backward(const StripedConv& inputs, const StripedConvGradients& gradients, void* stream) {
  chosen->striped_conv_backward(inputs, gradients, stream);
}

int64_t striped_conv_router_parts(const StripedConv& inputs) { return chosen->striped_conv_router_parts(inputs); }

void striped_conv_router(const StripedConv& inputs, const Image& y, float* sums, void* stream) {
  if (inputs.dtype == DType::float64) throw std::runtime_error("striped_conv_router: x is float64, expected float32");
  chosen->striped_conv_router(inputs, y, sums, stream);
}

int64_t pool_parts(const Pooled& a) { return chosen->pool_parts(a); }

void pool(const Pooled& a, void* partial, void* stream) { chosen->pool(a, partial, stream); }

void spread(const Pooled& da, const void* dmean, void* stream) { chosen->spread(da, dmean, stream); }

void calibrate(const Calibrate& inputs, const Image& y, void* maps, void* small, void* stream) {
  chosen->calibrate(inputs, y, maps, small, stream);
}

CalibrateWorkspace calibrate_workspace(const Calibrate& inputs) { return chosen->calibrate_workspace(inputs); }

void calibrate_backward(const Calibrate& inputs, const CalibrateGradients& gradients, void* stream) {
  chosen->calibrate_backward(inputs, gradients, stream);
}

void norm_pointwise(const NormPointwise& inputs, const TypedImage& residual, const TypedImage& y) {
  chosen->norm_pointwise(inputs, residual, y);
}

void norm_pointwise_backward(const NormPointwise& inputs, const NormPointwiseGradients& gradients) {
  chosen->norm_pointwise_backward(inputs, gradients);
}

void gated_ffn(const GatedFfn& inputs, const TypedImage& y) { chosen->gated_ffn(inputs, y); }

void gated_ffn_backward(const GatedFfn& inputs, const GatedFfnGradients& gradients) {
  chosen->gated_ffn_backward(inputs, gradients);
}

void norm_conv3x3(const NormConv3x3& inputs, const TypedImage& y) { chosen->norm_conv3x3(inputs, y); }

void norm_conv3x3_backward(const NormConv3x3& inputs, const NormConv3x3Gradients& gradients) {
  chosen->norm_conv3x3_backward(inputs, gradients);
}

void low_rank_experts(const LowRankExperts& inputs, const TypedImage& residual, const TypedImage& y) {
  chosen->low_rank_experts(inputs, residual, y);
}

void low_rank_experts_backward(const LowRankExperts& inputs, const LowRankExpertsGradients& gradients) {
  chosen->low_rank_experts_backward(inputs, gradients);
}

NetworkSizes network_sizes(const NetworkConfig& config) { return chosen->network_sizes(config); }

void network_pack(const NetworkConfig& config, const float* parameters, void* weights) {
  chosen->network_pack(config, parameters, weights);
}

NetworkMemory network_memory(const Network& network) { return chosen->network_memory(network); }

bool network(const Network& network, void* state, void* rest) { return chosen->network(network, state, rest); }

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
