// Parameters of router; formula and shapes in seemore_fast/reference/router.py.
//
// Two steps, each a launch: pool computes sums over parts of the images, route adds them up and decides. So the sums
// can also come from the operator that computed the images. `accum` is the type of all that is not an image or a
// weight: float32, or float64 where the images are float64.
#pragma once

#include "params/views.h"

namespace seemore {

// All images (B, C, H, W) of one tensor.
struct SizedImage {
  DType dtype;
  Size size;
  Image image;
};

struct Routing {
  DType accum, weight_dtype;
  int64_t batch, channels, experts, top_k;
  const void* weight;  // (E, C), contiguous
};

// Input and output of route, all contiguous.
struct Routed {
  const void* partial;    // (parts, B, C): the sums of part after part
  int64_t parts, pixels;  // pixels: H W, the divisor of means
  int64_t* expert_index;  // (B, top_k)
  void* expert_weight;    // (B, top_k)
  void* mean;             // (B, C); null where `partial` is the means already: parts and pixels are 1
  void* probability;      // (B, E)
};

struct RoutingGradients {
  const void* dexpert_weight;           // (B, top_k)
  int64_t image_stride, choice_stride;  // of dexpert_weight
  const int64_t* expert_index;          // (B, top_k), and so on: contiguous
  const void *mean, *probability;       // (B, C), (B, E)
  void *dmean, *dweight;                // (B, C); (E, C) of the weights' type
};

// The number of parts that pool cuts every image into; it depends on the size, type and layout of one image alone.
int64_t pool_parts(const SizedImage& a);
// Writes (parts, B, C) sums.
void pool(const SizedImage& a, void* partial, void* stream);
void route(const Routing& routing, const Routed& routed, void* stream);
void route_backward(const Routing& routing, const RoutingGradients& gradients, void* stream);
// pool's gradient: every pixel is dmean (B, C) / (H W).
void spread(const SizedImage& da, const void* dmean, void* stream);

}  // namespace seemore
