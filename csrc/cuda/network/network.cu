// The whole network for inference, in the CUDA library: 6 launches a group, and two.
//
//   head        conv_1(image)                                  -> x
//   front       LN, 3x3, GELU, pointwise, stripes, GELU        x -> a, ranks of k, its first aggregate, sums of a
//   small_map   the rest of the calibration, for all ranks     -> small map
//   route       the choice of experts                          sums of a -> experts
//   experts     experts, projection, + x, GatedFFN             x, a, ranks, small map -> x
//   see         LN, pointwise, stripes * v, projection, + x    x -> x
//   ffn         GatedFFN                                       x -> x
//   tail        LN, conv_2, + conv_1(image), 3x3, shuffle      x, image -> image
//
// Nothing waits for the GPU. Features are 16 bits wide between launches, x among them, as they are in PyTorch; norms'
// statistics, sums, the pool, routing and the ends are float32.

#include <utility>

#include "cuda/network/launches.h"
#include "params/router.h"

namespace seemore {
namespace {

// The memory of a run.
struct Memory {
  Memory(const gpu::Scene& scene, void* state) {
    const gpu::Widths& widths = scene.widths;
    const NetworkConfig& config = scene.config();
    const int64_t pixels = scene.pixels(), images = scene.net.size.batch;
    gpu::Parts parts(state);
    for (void*& x : buffers.x) x = parts.next<uint32_t>(pixels * widths.channels / 2);
    buffers.a = parts.next<uint32_t>(pixels * widths.channels / 2);
    buffers.ranks = parts.next<uint32_t>(pixels * widths.ranks() / 2);
    const auto map = [&](int64_t level) {
      const Size size = scene.map(level);
      return size.batch * size.height * size.width;
    };
    buffers.aggregate = parts.next<float>(map(1) * widths.channels);
    buffers.small = parts.next<float>(map(config.recursive) * widths.ranks());
    buffers.partial = parts.next<float>(pixels ? gpu::front_parts(scene) * images * config.channels : 0);
    buffers.expert_index = parts.next<int64_t>(images * config.top_k);
    buffers.expert_weight = parts.next<float>(images * config.top_k);
    buffers.mean = parts.next<float>(images * config.channels);
    buffers.probability = parts.next<float>(images * config.experts);
    needed = {parts.bytes(), 0};
  }
  gpu::Buffers buffers;
  NetworkMemory needed;
};

}  // namespace

NetworkMemory network_memory(const Network& net) {
  return Memory({net, gpu::Widths(net.config), {}, nullptr}, nullptr).needed;
}

bool network(const Network& net, void* state, void*) {
  gpu::Scene scene{net, gpu::Widths(net.config), {}, net.stream};
  const NetworkConfig& config = net.config;
  const int64_t images = net.size.batch, pixels = net.size.height * net.size.width;
  if (images * pixels == 0) return true;
  gpu::Buffers& buffers = scene.buffers;
  buffers = Memory(scene, state).buffers;
  const gpu::NetworkWeights weights(config, net.weights);
  const int64_t parts = gpu::front_parts(scene);
  launch_head(scene, weights.ends());
  for (int64_t number = 0; number < config.groups; ++number) {
    const gpu::GroupWeights group = weights.group(number);
    if (number > 0) std::swap(buffers.x[0], buffers.x[1]);
    launch_front(scene, group);
    launch_small_map(scene, group);
    route({DType::float32, DType::float32, images, config.channels, config.experts, config.top_k, group.router},
          {buffers.partial, parts, pixels, buffers.expert_index, buffers.expert_weight, buffers.mean,
           buffers.probability},
          net.stream);
    launch_experts(scene, group);
    launch_see(scene, group);
    launch_ffn(scene, group);
  }
  launch_tail(scene, weights.ends());
  return true;
}

}  // namespace seemore
