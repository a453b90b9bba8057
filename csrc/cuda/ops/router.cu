// router on CUDA: mean over the pixels, softmax(weight @ mean), the top_k most probable experts; and its gradients.
//
// pool reads every image once; all else is a few numbers per image. For (1, 36, 480, 640) in bfloat16 that is 22.1 MB
// and 11 million additions: a floor of 5.1 us at 4.3 TB/s. Predicted, not yet run on a GPU: pool 6.5 us, route 2.5 us,
// with the gap between two launches of a CUDA graph 10 us in all. Backward: a tiny launch, then spread, which writes
// as many bytes: 10 us, too.
// ptxas for sm_90, 16-bit and float32: pool 62 or 48 registers and 8 or 4 KB of shared memory, spread 44, route 40 and
// 2 KB + 4 (C + E) bytes, its gradient 48 and 1 KB. float64: at most 80 registers. Nothing spills.

#include "cuda/common/launch.h"
#include "cuda/common/types.h"
#include "params/router.h"

namespace {

using seemore::DType;
using seemore::Routed;
using seemore::Routing;
using seemore::RoutingGradients;

constexpr int kThreads = 256;

// Sums value(row, column) over the rows, kLoads of them at a time, and hands each column's to store(column, sum).
// Threads that go through the rows in turn are as many as fit beside one another, at most one per row; their sums are
// added in their order. For all threads of the block; ends with a barrier.
template <int kLoads, int kBlock, typename A, typename Value, typename Store>
__device__ void sum_rows(A (&seen)[kBlock], int64_t rows, int64_t columns, Value value, Store store) {
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int width = static_cast<int>(min(columns - first, int64_t(kBlock)));
    const int teams = static_cast<int>(min(int64_t(kBlock / width), rows)), team = threadIdx.x / width;
    const int64_t column = first + threadIdx.x % width;
    A sum = 0;
    for (int64_t row = team; team < teams && row < rows; row += kLoads * teams) {
      A loaded[kLoads];
#pragma unroll
      for (int n = 0; n < kLoads; ++n) loaded[n] = row + n * teams < rows ? value(row + n * teams, column) : A(0);
#pragma unroll
      for (int n = 0; n < kLoads; ++n) sum += loaded[n];
    }
    seen[threadIdx.x] = sum;
    __syncthreads();
    if (team == 0) {
      for (int other = 1; other < teams; ++other) sum += seen[other * width + threadIdx.x];
      store(column, sum);
    }
    __syncthreads();
  }
}

constexpr int kRouteThreads = 512;
constexpr int64_t kMostShared = 40 * 1024;  // beside sum_rows' 4 KB, in the 48 KB of every GPU

// The order of experts: by probability, and the lower index first. NaN is larger than all, as for torch.topk. A total
// order, so that the ranks are all different, whatever the probabilities.
template <typename A>
__device__ bool precedes(A p, int64_t expert, A other_p, int64_t other) {
  const bool is_nan = p != p, other_is_nan = other_p != other_p;
  if (is_nan || other_is_nan) return is_nan && (!other_is_nan || expert < other);
  return p > other_p || (p == other_p && expert < other);
}

// A block has an image. Its means and probabilities are in shared memory; where they do not fit, in the results.
template <typename A, typename W>
__global__ void __launch_bounds__(kRouteThreads) route_kernel(Routing routing, Routed routed, bool is_shared) {
  DYNAMIC_SHARED(A, shared);
  __shared__ A seen[kRouteThreads];
  const int64_t image = blockIdx.x, channels = routing.channels, experts = routing.experts;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const A* const partial = static_cast<const A*>(routed.partial) + image * channels;
  const W* const weight = static_cast<const W*>(routing.weight);
  A* const mean_result = routed.mean ? static_cast<A*>(routed.mean) + image * channels : nullptr;
  A* const result = static_cast<A*>(routed.probability) + image * experts;
  A* const p = is_shared ? shared : result;
  const A* mean = partial;
  if (mean_result) {
    A* const kept = is_shared ? shared + experts : mean_result;
    const A pixels = static_cast<A>(routed.pixels);
    const auto value = [&](int64_t part, int64_t channel) {
      return partial[part * routing.batch * channels + channel];
    };
    sum_rows<8>(seen, routed.parts, channels, value,
                [&](int64_t channel, A sum) { mean_result[channel] = kept[channel] = sum / pixels; });
    mean = kept;
  }

  for (int64_t expert = warp; expert < experts; expert += kRouteThreads / kWarp) {
    A logit = 0;
    for (int64_t channel = lane; channel < channels; channel += kWarp) {
      logit += static_cast<A>(to_accum(weight[expert * channels + channel])) * mean[channel];
    }
    logit = sum_of_warp(logit);
    if (lane == 0) p[expert] = logit;
  }
  __syncthreads();

  // Every warp finds the same two numbers: that takes no barrier.
  A largest = p[0], total = 0;
  for (int64_t expert = lane; expert < experts; expert += kWarp) largest = fmax(largest, p[expert]);
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  }
  for (int64_t expert = lane; expert < experts; expert += kWarp) total += exp(p[expert] - largest);
  total = sum_of_warp(total);
  __syncthreads();
  for (int64_t expert = threadIdx.x; expert < experts; expert += kRouteThreads) {
    result[expert] = p[expert] = exp(p[expert] - largest) / total;
  }
  __syncthreads();

  for (int64_t expert = threadIdx.x; expert < experts; expert += kRouteThreads) {
    const A own = p[expert];
    int64_t rank = 0;
    for (int64_t other = 0; other < experts; ++other) rank += precedes(p[other], other, own, expert);
    if (rank < routing.top_k) {
      routed.expert_index[image * routing.top_k + rank] = expert;
      static_cast<A*>(routed.expert_weight)[image * routing.top_k + rank] = own;
    }
  }
}

// Softmax's gradient for one image and expert: p (dp - sum of dp p), where dp is 0 for experts that were not chosen.
template <typename A>
__device__ A logit_gradient(const Routing& routing, const RoutingGradients& gradients, int64_t image, int64_t expert) {
  const A* const p = static_cast<const A*>(gradients.probability) + image * routing.experts;
  const A* const dp = static_cast<const A*>(gradients.dexpert_weight) + image * gradients.image_stride;
  const int64_t* const index = gradients.expert_index + image * routing.top_k;
  A own = 0, sum = 0;
  for (int64_t choice = 0; choice < routing.top_k; ++choice) {
    const A gradient = dp[choice * gradients.choice_stride];
    const int64_t chosen = index[choice];
    sum += gradient * p[chosen];
    if (chosen == expert) own = gradient;
  }
  return p[expert] * (own - sum);
}

// The first blocks have an image each, for its row of dmean; the others an expert, for its row of dweight.
template <typename A, typename W>
__global__ void __launch_bounds__(kThreads) route_backward_kernel(Routing routing, RoutingGradients gradients) {
  __shared__ A seen[kThreads];
  const int64_t channels = routing.channels;
  if (blockIdx.x < routing.batch) {
    const int64_t image = blockIdx.x;
    const W* const weight = static_cast<const W*>(routing.weight);
    A* const dmean = static_cast<A*>(gradients.dmean) + image * channels;
    const auto value = [&](int64_t expert, int64_t channel) {
      return logit_gradient<A>(routing, gradients, image, expert) *
             static_cast<A>(to_accum(weight[expert * channels + channel]));
    };
    sum_rows<1>(seen, routing.experts, channels, value, [&](int64_t channel, A sum) { dmean[channel] = sum; });
  } else {
    const int64_t expert = blockIdx.x - routing.batch;
    const A* const mean = static_cast<const A*>(gradients.mean);
    W* const dweight = static_cast<W*>(gradients.dweight) + expert * channels;
    const auto value = [&](int64_t image, int64_t channel) {
      return logit_gradient<A>(routing, gradients, image, expert) * mean[image * channels + channel];
    };
    sum_rows<1>(seen, routing.batch, channels, value,
                [&](int64_t channel, A sum) { dweight[channel] = to_storage<W>(static_cast<Accumulation<W>>(sum)); });
  }
}

// Call function(0 of the accumulation type, 0 of the weights' type).
template <typename Function>
void with_types(const Routing& routing, Function function) {
  with_type(routing.weight_dtype, [&](auto weight) {
    routing.accum == DType::float64 ? function(double(), weight) : function(float(), weight);
  });
}

}  // namespace

namespace seemore {

void route(const Routing& routing, const Routed& routed, void* stream) {
  if (routing.batch == 0) return;
  with_types(routing, [&](auto accum, auto weight) {
    using A = decltype(accum);
    using W = decltype(weight);
    const int64_t bytes = (routing.experts + routing.channels) * sizeof(A);
    const bool is_shared = bytes <= kMostShared;
    LAUNCH((route_kernel<A, W>), grid_of(routing.batch, "router"), kRouteThreads, is_shared ? bytes : 0, stream,
           routing, routed, is_shared);
  });
}

void route_backward(const Routing& routing, const RoutingGradients& gradients, void* stream) {
  with_types(routing, [&](auto accum, auto weight) {
    using A = decltype(accum);
    using W = decltype(weight);
    const unsigned grid = grid_of(routing.batch + routing.experts, "router_backward");
    LAUNCH((route_backward_kernel<A, W>), grid, kThreads, 0, stream, routing, gradients);
  });
}

}  // namespace seemore
