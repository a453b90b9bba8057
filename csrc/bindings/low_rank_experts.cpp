// low_rank_experts as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/low_rank_experts.h"

#include <numeric>
#include <vector>

#include "bindings/layer_tensors.h"

#define PARAMETERS(P)                \
  P(Tensor, expert_weight, B, top_k) \
  P(Tensor, weight_a, rank, C)       \
  P(Tensor, bias_a, rank)            \
  P(Tensor, weight_k, rank, C)       \
  P(Tensor, bias_k, rank)            \
  P(Tensor, weight_out, C, rank)     \
  P(Tensor, bias_out, experts, C)
#define PROJECTION(P)                        \
  P(OptionalTensor, weight_proj, C, C, 1, 1) \
  P(OptionalTensor, bias_proj, C)

namespace {

using namespace seemore::bindings;
using Ranks = std::vector<int64_t>;

seemore::LowRankExperts inputs_of(const LayerCheck& check, const Tensor& a, const Tensor& k, const Tensor& expert_index,
                                  PARAMETERS(SEEMORE_ARGUMENT) const Ranks& ranks, const OptionalTensor& weight_proj,
                                  const OptionalTensor& bias_proj) {
  const int64_t B = a.size(0), C = a.size(1), top_k = expert_index.dim() == 2 ? expert_index.size(1) : 0;
  const int64_t experts = ranks.size(), rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
  if (expert_index.scalar_type() != ScalarType::Long) check.refuse("expert_index", "has another dtype", "int64");
  check.of_any_dtype("expert_index", expert_index, {B, top_k});
  check.contiguous("expert_index", expert_index);
  return {check.is_double(),
          size(a),
          experts,
          top_k,
          rank,
          ranks.data(),
          check.image("a", a, a.sizes()),
          check.image("k", k, a.sizes()),
          static_cast<const int64_t*>(expert_index.data_ptr()),
          PARAMETERS(SEEMORE_CHECKED) PROJECTION(SEEMORE_CHECKED)};
}

void low_rank_experts(const Tensor& y, const Tensor& a, const Tensor& k, const Tensor& expert_index,
                      PARAMETERS(SEEMORE_ARGUMENT) const Ranks& ranks,
                      PROJECTION(SEEMORE_ARGUMENT) const OptionalTensor& residual) {
  const LayerCheck check("low_rank_experts", "a", a);
  const auto inputs = inputs_of(check, a, k, expert_index, PARAMETERS(SEEMORE_VALUE) ranks, weight_proj, bias_proj);
  seemore::low_rank_experts(inputs, check.image("residual", residual, a.sizes()), check.image("y", y, a.sizes()));
}

void low_rank_experts_backward(const Tensor& da, const Tensor& dk,
                               PARAMETERS(SEEMORE_GRADIENT) PROJECTION(SEEMORE_GRADIENT) const Tensor& dy,
                               const Tensor& a, const Tensor& k, const Tensor& expert_index,
                               PARAMETERS(SEEMORE_ARGUMENT) const Ranks& ranks, const OptionalTensor& weight_proj) {
  const LayerCheck check("low_rank_experts", "a", a);
  const auto inputs = inputs_of(check, a, k, expert_index, PARAMETERS(SEEMORE_VALUE) ranks, weight_proj, std::nullopt);
  const auto [B, C, height, width] = size(a);
  const int64_t experts = inputs.experts, top_k = inputs.top_k, rank = inputs.rank;
  seemore::low_rank_experts_backward(
      inputs, {check.image("dy", dy, a.sizes()), check.image("da", da, a.sizes()), check.image("dk", dk, a.sizes()),
               PARAMETERS(SEEMORE_CHECKED_GRADIENT) PROJECTION(SEEMORE_CHECKED_GRADIENT)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("low_rank_experts(Tensor(a!) y, Tensor a, Tensor k, Tensor expert_index, " PARAMETERS(
      SEEMORE_SCHEMA) "int[] ranks, " PROJECTION(SEEMORE_SCHEMA) "Tensor? residual) -> ()");
  m.def("low_rank_experts_backward(Tensor(a!) da, Tensor(b!) dk, " PARAMETERS(SEEMORE_GRADIENT_SCHEMA)
            PROJECTION(SEEMORE_GRADIENT_SCHEMA) "Tensor dy, Tensor a, Tensor k, Tensor expert_index, " PARAMETERS(
                SEEMORE_SCHEMA) "int[] ranks, Tensor? weight_proj) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("low_rank_experts", TORCH_BOX(&low_rank_experts));
  m.impl("low_rank_experts_backward", TORCH_BOX(&low_rank_experts_backward));
}
