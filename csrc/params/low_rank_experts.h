// Parameters of low_rank_experts in the CPU library; formula and shapes in seemore_fast/reference/low_rank_experts.py.
#pragma once

#include "params/layer_types.h"

namespace seemore {

struct LowRankExperts {
  bool is_double;                // a is float64: then all is
  Size size;                     // of a
  int64_t experts, top_k, rank;  // rank: of all experts together
  const int64_t* ranks;          // of each
  TypedImage a, k;
  const int64_t* expert_index;  // (B, top_k)
  Parameter expert_weight;      // (B, top_k)
  Parameter weight_a, bias_a, weight_k, bias_k, weight_out, bias_out;
  Parameter weight_proj, bias_proj;  // both or neither
};

// The projection's are null where there is none.
struct LowRankExpertsGradients {
  TypedImage dy, da, dk;
  Parameter dexpert_weight, dweight_a, dbias_a, dweight_k, dbias_k, dweight_out, dbias_out, dweight_proj, dbias_proj;
};

// residual: with a projection, the image that it is added to.
void low_rank_experts(const LowRankExperts& inputs, const TypedImage& residual, const TypedImage& y);
void low_rank_experts_backward(const LowRankExperts& inputs, const LowRankExpertsGradients& gradients);

}  // namespace seemore
