// low_rank_experts as an operator of a library. Results are written to tensors that the caller allocated.

#include "params/low_rank_experts.h"

#include <numeric>
#include <vector>

#include "bindings/layer_tensors.h"

namespace {

using namespace seemore::bindings;
using OptionalTensor = std::optional<Tensor>;

seemore::LowRankExperts inputs_of(const LayerCheck& check, const Tensor& a, const Tensor& k, const Tensor& expert_index,
                                  const Tensor& expert_weight, const Tensor& weight_a, const Tensor& bias_a,
                                  const Tensor& weight_k, const Tensor& bias_k, const Tensor& weight_out,
                                  const Tensor& bias_out, const std::vector<int64_t>& ranks,
                                  const OptionalTensor& weight_proj, const OptionalTensor& bias_proj) {
  const auto [batch, channels, height, width] = size(a);
  const int64_t experts = ranks.size(), rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
  const int64_t top_k = expert_index.dim() == 2 ? expert_index.size(1) : 0;
  if (expert_index.scalar_type() != ScalarType::Long) check.refuse("expert_index", "has another dtype", "int64");
  check.of_any_dtype("expert_index", expert_index, {batch, top_k});
  if (!expert_index.is_contiguous()) check.refuse("expert_index", "is not contiguous", "a contiguous tensor");
  return {check.is_double(),
          size(a),
          experts,
          top_k,
          rank,
          ranks.data(),
          check.image("a", a, {batch, channels, height, width}),
          check.image("k", k, {batch, channels, height, width}),
          static_cast<const int64_t*>(expert_index.data_ptr()),
          check.parameter("expert_weight", expert_weight, {batch, top_k}),
          check.parameter("weight_a", weight_a, {rank, channels}),
          check.parameter("bias_a", bias_a, {rank}),
          check.parameter("weight_k", weight_k, {rank, channels}),
          check.parameter("bias_k", bias_k, {rank}),
          check.parameter("weight_out", weight_out, {channels, rank}),
          check.parameter("bias_out", bias_out, {experts, channels}),
          check.parameter("weight_proj", weight_proj, {channels, channels, 1, 1}),
          check.parameter("bias_proj", bias_proj, {channels})};
}

void low_rank_experts(const Tensor& y, const Tensor& a, const Tensor& k, const Tensor& expert_index,
                      const Tensor& expert_weight, const Tensor& weight_a, const Tensor& bias_a, const Tensor& weight_k,
                      const Tensor& bias_k, const Tensor& weight_out, const Tensor& bias_out,
                      const std::vector<int64_t>& ranks, const OptionalTensor& weight_proj,
                      const OptionalTensor& bias_proj, const OptionalTensor& residual) {
  const LayerCheck check("low_rank_experts", "a", a);
  const auto inputs = inputs_of(check, a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k,
                                weight_out, bias_out, ranks, weight_proj, bias_proj);
  const auto shape = {a.size(0), a.size(1), a.size(2), a.size(3)};
  seemore::low_rank_experts(inputs, check.image("residual", residual, shape), check.image("y", y, shape));
}

void low_rank_experts_backward(const Tensor& da, const Tensor& dk, const Tensor& dexpert_weight,
                               const Tensor& dweight_a, const Tensor& dbias_a, const Tensor& dweight_k,
                               const Tensor& dbias_k, const Tensor& dweight_out, const Tensor& dbias_out,
                               const OptionalTensor& dweight_proj, const OptionalTensor& dbias_proj, const Tensor& dy,
                               const Tensor& a, const Tensor& k, const Tensor& expert_index,
                               const Tensor& expert_weight, const Tensor& weight_a, const Tensor& bias_a,
                               const Tensor& weight_k, const Tensor& bias_k, const Tensor& weight_out,
                               const Tensor& bias_out, const std::vector<int64_t>& ranks,
                               const OptionalTensor& weight_proj) {
  const LayerCheck check("low_rank_experts", "a", a);
  const auto inputs = inputs_of(check, a, k, expert_index, expert_weight, weight_a, bias_a, weight_k, bias_k,
                                weight_out, bias_out, ranks, weight_proj, std::nullopt);
  const auto [batch, channels, height, width] = size(a);
  const auto shape = {batch, channels, height, width};
  const int64_t rank = inputs.rank;
  seemore::low_rank_experts_backward(
      inputs, {check.image("dy", dy, shape), check.image("da", da, shape), check.image("dk", dk, shape),
               check.parameter("dexpert_weight", dexpert_weight, {batch, inputs.top_k}),
               check.parameter("dweight_a", dweight_a, {rank, channels}), check.parameter("dbias_a", dbias_a, {rank}),
               check.parameter("dweight_k", dweight_k, {rank, channels}), check.parameter("dbias_k", dbias_k, {rank}),
               check.parameter("dweight_out", dweight_out, {channels, rank}),
               check.parameter("dbias_out", dbias_out, {inputs.experts, channels}),
               check.parameter("dweight_proj", dweight_proj, {channels, channels, 1, 1}),
               check.parameter("dbias_proj", dbias_proj, {channels})});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "low_rank_experts(Tensor(a!) y, Tensor a, Tensor k, Tensor expert_index, Tensor expert_weight, "
      "Tensor weight_a, Tensor bias_a, Tensor weight_k, Tensor bias_k, Tensor weight_out, Tensor bias_out, "
      "int[] ranks, Tensor? weight_proj, Tensor? bias_proj, Tensor? residual) -> ()");
  m.def(
      "low_rank_experts_backward(Tensor(a!) da, Tensor(b!) dk, Tensor(c!) dexpert_weight, Tensor(d!) dweight_a, "
      "Tensor(e!) dbias_a, Tensor(f!) dweight_k, Tensor(g!) dbias_k, Tensor(h!) dweight_out, Tensor(i!) dbias_out, "
      "Tensor(j!)? dweight_proj, Tensor(k!)? dbias_proj, Tensor dy, Tensor a, Tensor k, Tensor expert_index, "
      "Tensor expert_weight, Tensor weight_a, Tensor bias_a, Tensor weight_k, Tensor bias_k, Tensor weight_out, "
      "Tensor bias_out, int[] ranks, Tensor? weight_proj) -> ()");
}

// For tensors of every device, so that Check refuses those of another one.
STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("low_rank_experts", TORCH_BOX(&low_rank_experts));
  m.impl("low_rank_experts_backward", TORCH_BOX(&low_rank_experts_backward));
}
