// The launches of the network, in their order; all are of images (B, C, H, W) whose features lie as `Features`.
#pragma once

#include "cuda/network/packed_weights.h"
#include "params/network.h"

namespace seemore::gpu {

// Memory between launches. x: two, of which a stage reads one and writes the other.
struct Buffers {
  void *x[2], *a, *ranks;  // ranks: [pixel][rank], weight_k @ k
  float* aggregate;        // k aggregated once, before GELU: [pixel][channel] at a quarter of the size
  float* small;            // the small map: [pixel][rank]
  float* partial;          // (parts, B, C): sums of a
  int64_t* expert_index;   // (B, top_k)
  float *expert_weight, *mean, *probability;
};

struct Scene {
  const Network& net;
  Widths widths;
  Buffers buffers;
  void* stream;
  Rows held;  // of features, by the buffers
  Rows rows;  // that launches compute

  const NetworkConfig& config() const { return net.config; }
  int channels() const { return static_cast<int>(net.config.channels); }
  int64_t pixels() const { return net.size.batch * (held.last - held.first) * net.size.width; }
  // The features of the whole image's pixels, of which the memory has those held.
  template <int kChannels>
  FeatureMemory features(void* memory) const {
    const auto held_features = Features<kChannels>::at(memory, pixels());
    const int64_t above = held.first * net.size.width;
    return {held_features.head - above * (kHead / 2), held_features.tail - above * (kChannels - kHead) / 2};
  }
  uint32_t* ranks() const {
    return static_cast<uint32_t*>(buffers.ranks) - held.first * net.size.width * widths.ranks() / 2;
  }
  Size map(int64_t level) const {  // sizes after so many aggregations
    Size size = net.size;
    for (int64_t i = 0; i < level; ++i) size.height /= 4, size.width /= 4;
    return size;
  }
};

// x[0] of the image.
void launch_head(const Scene& scene, const EndWeights& weights);
// a, ranks, aggregate and partial, of x[0]: the MoE block up to its pool.
void launch_front(const Scene& scene, const GroupWeights& weights);
// Where aggregate and partial are null, without these.
int64_t front_parts(const Scene& scene);
// Rows of which the pool's sums are parts: rows that are computed with sums begin at a multiple.
int64_t front_rows(const Scene& scene);
// small, of aggregate.
void launch_small_map(const Scene& scene, const GroupWeights& weights);
// x[1]: the MoE block from its pool on, and RME's GatedFFN, of x[0], a, ranks, small and the experts chosen.
void launch_experts(const Scene& scene, const GroupWeights& weights);
// x[0]: SEE of x[1].
void launch_see(const Scene& scene, const GroupWeights& weights);
// x[1]: SME's GatedFFN of x[0].
void launch_ffn(const Scene& scene, const GroupWeights& weights);
// The image, of x[1] and the image.
void launch_tail(const Scene& scene, const EndWeights& weights);

}  // namespace seemore::gpu
