// router as the libraries see it; formula and shapes in seemore_fast/reference/router.py.
//
// Two steps, each a launch: pool makes sums over parts of the images, route adds them up and decides. So the sums can
// also come from the operator that made the images, while they passed by. `wide` is the type of all that is not an
// image or a weight: float32, or float64 where the images are of that.
#pragma once

#include "params/views.h"

namespace seemore {

// All images (B, C, H, W) of one tensor.
struct Pooled {
  DType dtype;
  Size size;
  Image image;
};

struct Routing {
  DType wide, weight_dtype;
  int64_t batch, channels, experts, top_k;
  const void* weight;  // (E, C), contiguous
};

// What route reads and writes, all contiguous.
struct Routed {
  const void* partial;    // (parts, B, C): the sums of part after part
  int64_t parts, pixels;  // pixels: H W, of which a mean is
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

// Into how many parts pool cuts every image: it depends on the size, type and layout of one image alone.
int64_t pool_parts(const Pooled& a);
// Writes (parts, B, C) sums.
void pool(const Pooled& a, void* partial, void* stream);
void route(const Routing& routing, const Routed& routed, void* stream);
void route_backward(const Routing& routing, const RoutingGradients& gradients, void* stream);
// pool's gradient: every pixel is dmean (B, C) / (H W).
void spread(const Pooled& da, const void* dmean, void* stream);

}  // namespace seemore
