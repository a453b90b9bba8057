// The router's decision after the pool, for its operator and the network, and its gradient; not performance-critical:
// compiled once.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "params/router.h"

namespace seemore {
namespace {

// The order of experts: by probability, and the lower index first. NaN is larger than all, as for torch.topk.
template <class A>
bool precedes(const A* p, int64_t expert, int64_t other) {
  const bool is_nan = p[expert] != p[expert], other_is_nan = p[other] != p[other];
  if (is_nan || other_is_nan) return is_nan && (!other_is_nan || expert < other);
  return p[expert] > p[other] || (p[expert] == p[other] && expert < other);
}

// Sums are float64 always, everything else is of the type A that results are of.
template <class A, class W>
void route_image(const Routing& routing, const Routed& routed, int64_t image) {
  const int64_t channels = routing.channels, experts = routing.experts, top_k = routing.top_k;
  const A* mean = static_cast<const A*>(routed.partial) + image * channels;
  if (routed.mean) {
    A* const result = static_cast<A*>(routed.mean) + image * channels;
    std::vector<double> sums(channels);
    for (int64_t part = 0; part < routed.parts; ++part) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        sums[channel] += mean[part * routing.batch * channels + channel];
      }
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
      result[channel] = static_cast<A>(sums[channel] / static_cast<double>(routed.pixels));
    }
    mean = result;
  }
  A* const p = static_cast<A*>(routed.probability) + image * experts;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const W* const weight = static_cast<const W*>(routing.weight) + expert * channels;
    double logit = 0;
    for (int64_t channel = 0; channel < channels; ++channel) {
      logit += static_cast<double>(weight[channel]) * static_cast<double>(mean[channel]);
    }
    p[expert] = static_cast<A>(logit);
  }
  A largest = p[0];
  for (int64_t expert = 1; expert < experts; ++expert) largest = std::fmax(largest, p[expert]);
  double total = 0;
  for (int64_t expert = 0; expert < experts; ++expert) total += p[expert] = std::exp(p[expert] - largest);
  for (int64_t expert = 0; expert < experts; ++expert) p[expert] = static_cast<A>(p[expert] / total);

  std::vector<int64_t> order(experts);
  std::iota(order.begin(), order.end(), 0);
  const auto first = [p](int64_t expert, int64_t other) { return precedes(p, expert, other); };
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), first);
  for (int64_t choice = 0; choice < top_k; ++choice) {
    routed.expert_index[image * top_k + choice] = order[choice];
    static_cast<A*>(routed.expert_weight)[image * top_k + choice] = p[order[choice]];
  }
}

template <class A, class W>
void gradients_of(const Routing& routing, const RoutingGradients& gradients) {
  const int64_t channels = routing.channels, experts = routing.experts, top_k = routing.top_k;
  const W* const weight = static_cast<const W*>(routing.weight);
  std::vector<double> dweight(experts * channels), dlogit(experts), dmean(channels);
  for (int64_t image = 0; image < routing.batch; ++image) {
    const A* const p = static_cast<const A*>(gradients.probability) + image * experts;
    const A* const mean = static_cast<const A*>(gradients.mean) + image * channels;
    const A* const dp = static_cast<const A*>(gradients.dexpert_weight) + image * gradients.image_stride;
    // Softmax's gradient: p (dp - sum of dp p), where dp is 0 for experts that were not chosen.
    std::fill(dlogit.begin(), dlogit.end(), 0);
    double sum = 0;
    for (int64_t choice = 0; choice < top_k; ++choice) {
      const int64_t chosen = gradients.expert_index[image * top_k + choice];
      dlogit[chosen] = dp[choice * gradients.choice_stride];
      sum += dlogit[chosen] * p[chosen];
    }
    for (int64_t expert = 0; expert < experts; ++expert) dlogit[expert] = p[expert] * (dlogit[expert] - sum);

    std::fill(dmean.begin(), dmean.end(), 0);
    for (int64_t expert = 0; expert < experts; ++expert) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        const int64_t place = expert * channels + channel;
        dmean[channel] += dlogit[expert] * static_cast<double>(weight[place]);
        dweight[place] += dlogit[expert] * static_cast<double>(mean[channel]);
      }
    }
    A* const to = static_cast<A*>(gradients.dmean) + image * channels;
    std::copy(dmean.begin(), dmean.end(), to);
  }
  W* const to = static_cast<W*>(gradients.dweight);
  std::transform(dweight.begin(), dweight.end(), to, [](double sum) { return static_cast<W>(static_cast<A>(sum)); });
}

// Call function(0 of the accumulation type, 0 of the weights' type).
template <class Function>
void with_types(const Routing& routing, const Function& function) {
  const auto choose_weight = [&](auto accum) {
    switch (routing.weight_dtype) {
      case DType::float32:
        return function(accum, float());
      case DType::float64:
        return function(accum, double());
      case DType::float16:
        return function(accum, c10::Half());
      case DType::bfloat16:
        return function(accum, c10::BFloat16());
    }
  };
  routing.accum == DType::float64 ? choose_weight(double()) : choose_weight(float());
}

}  // namespace

void route(const Routing& routing, const Routed& routed, void*) {
  with_types(routing, [&](auto accum, auto weight) {
    for (int64_t image = 0; image < routing.batch; ++image) {
      route_image<decltype(accum), decltype(weight)>(routing, routed, image);
    }
  });
}

void route_backward(const Routing& routing, const RoutingGradients& gradients, void*) {
  with_types(routing,
             [&](auto accum, auto weight) { gradients_of<decltype(accum), decltype(weight)>(routing, gradients); });
}

}  // namespace seemore
