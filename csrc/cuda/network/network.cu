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

#include <algorithm>
#include <utility>

#include "cuda/network/launches.h"
#include "params/router.h"

namespace seemore {
namespace {

// Rows around a band that are read: of the features, by a group and by what comes before the next pool or the result.
constexpr int64_t kHalo = 11;

// The memory of a run: of features, and the rest, which follows where it has no memory of its own.
struct Memory {
  Memory(const gpu::Scene& scene, void* state, void* workspace) {
    const gpu::Widths& widths = scene.widths;
    const NetworkConfig& config = scene.config();
    const int64_t pixels = scene.pixels(), images = scene.net.size.batch;
    gpu::Parts features(state);
    for (void*& x : buffers.x) x = features.next<uint32_t>(pixels * widths.channels / 2);
    buffers.a = features.next<uint32_t>(pixels * widths.channels / 2);
    buffers.ranks = features.next<uint32_t>(pixels * widths.ranks() / 2);
    gpu::Parts rest(workspace ? workspace : state ? static_cast<char*>(state) + features.bytes() : nullptr);
    const auto map = [&](int64_t level) {
      const Size size = scene.map(level);
      return size.batch * size.height * size.width;
    };
    buffers.aggregate = rest.next<float>(map(1) * widths.channels);
    buffers.small = rest.next<float>(map(config.recursive) * widths.ranks());
    buffers.partial = rest.next<float>(pixels ? gpu::front_parts(scene) * images * config.channels : 0);
    buffers.expert_index = rest.next<int64_t>(images * config.top_k);
    buffers.expert_weight = rest.next<float>(images * config.top_k);
    buffers.mean = rest.next<float>(images * config.channels);
    buffers.probability = rest.next<float>(images * config.experts);
    needed = {features.bytes(), rest.bytes()};
  }
  gpu::Buffers buffers;
  NetworkMemory needed;
};

gpu::Scene scene_of(const Network& net, const Rows& held) {
  return {net, gpu::Widths(net.config), {}, net.stream, held, {0, net.size.height}};
}

// What a pool decides, from the sums, in so many parts, and the aggregates of all pixels.
void decide(const gpu::Scene& scene, const gpu::GroupWeights& group, int64_t parts) {
  const NetworkConfig& config = scene.config();
  const gpu::Buffers& buffers = scene.buffers;
  const Size& size = scene.net.size;
  launch_small_map(scene, group);
  route({DType::float32, DType::float32, size.batch, config.channels, config.experts, config.top_k, group.router},
        {buffers.partial, parts, size.height * size.width, buffers.expert_index, buffers.expert_weight, buffers.mean,
         buffers.probability},
        scene.stream);
}

// The rows that the buffers of a band hold.
Rows held_by(const Rows& rows, int64_t band_rows) {
  const int64_t first = std::max<int64_t>(rows.first - kHalo, 0);
  return {first, first + band_rows + 2 * kHalo};
}

// Copies rows of features from x[1] of a band to the host's memory, or from there to x[0].
void copy_rows(gpu::Scene scene, const NetworkPart& part, const Rows& rows, int64_t band_rows, bool to_host) {
  if (rows.first == rows.last) return;
  const int64_t width = scene.net.size.width;
  if (to_host) scene.held = held_by(rows, band_rows);
  gpu::with_features(DType::bfloat16, scene.channels(), [&](auto, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const gpu::FeatureMemory all = gpu::Features<kChannels>::at(part.features, scene.net.size.height * width);
    const gpu::FeatureMemory band = scene.features<kChannels>(scene.buffers.x[to_host]);
    const auto copy = [&](uint32_t* of_band, uint32_t* of_all, int64_t words) {  // words: of a pixel
      const int64_t begin = rows.first * width * words, count = (rows.last - rows.first) * width * words;
      uint32_t* const from = (to_host ? of_band : of_all) + begin;
      copy_async((to_host ? of_all : of_band) + begin, from, count * int64_t(sizeof(uint32_t)), scene.stream);
    };
    copy(band.head, all.head, gpu::kHead / 2);
    copy(band.tail, all.tail, (kChannels - gpu::kHead) / 2);
  });
}

}  // namespace

NetworkMemory network_memory(const Network& net) {
  const NetworkMemory needed = Memory(scene_of(net, {0, net.size.height}), nullptr, nullptr).needed;
  return {needed.state + needed.workspace, 0};
}

bool network(const Network& net, void* state, void*) {
  gpu::Scene scene = scene_of(net, {0, net.size.height});
  if (scene.pixels() == 0) return true;
  gpu::Buffers& buffers = scene.buffers;
  buffers = Memory(scene, state, nullptr).buffers;
  const gpu::NetworkWeights weights(net.config, net.weights);
  const int64_t parts = gpu::front_parts(scene);
  launch_head(scene, weights.ends());
  for (int64_t number = 0; number < net.config.groups; ++number) {
    const gpu::GroupWeights group = weights.group(number);
    if (number > 0) std::swap(buffers.x[0], buffers.x[1]);
    launch_front(scene, group);
    decide(scene, group, parts);
    launch_experts(scene, group);
    launch_see(scene, group);
    launch_ffn(scene, group);
  }
  launch_tail(scene, weights.ends());
  return true;
}

NetworkPartMemory network_part_memory(const Network& net, int64_t rows) {
  const gpu::Scene scene = scene_of(net, held_by({0, rows}, rows));
  const NetworkMemory needed = Memory(scene, nullptr, nullptr).needed;
  const int64_t features = net.size.height * net.size.width * scene.widths.channels * 2;
  return {needed.state, needed.workspace, features, gpu::front_rows(scene)};
}

void network_part(const Network& net, const NetworkPart& part, int64_t band_rows, void* band, void* rest) {
  gpu::Scene scene = scene_of(net, held_by(part.rows, band_rows));
  gpu::Buffers& buffers = scene.buffers;
  buffers = Memory(scene, band, rest).buffers;
  const gpu::NetworkWeights weights(net.config, net.weights);
  const auto around = [&](int64_t halo) {
    return Rows{std::max<int64_t>(part.rows.first - halo, 0), std::min(part.rows.last + halo, net.size.height)};
  };
  // The band before is stored once what this one reads of its rows is loaded; but at the end of a pass, at once.
  const bool begins = part.rows.first == 0;
  if (begins) copy_rows(scene, part, part.before, band_rows, true);
  if (part.pass > 0) copy_rows(scene, part, around(kHalo), band_rows, false);
  if (!begins) copy_rows(scene, part, part.before, band_rows, true);
  if (part.pass == 0) {
    scene.rows = around(2);
    std::swap(buffers.x[0], buffers.x[1]);
    launch_head(scene, weights.ends());
    std::swap(buffers.x[0], buffers.x[1]);
  } else {
    const gpu::GroupWeights group = weights.group(part.pass - 1);
    const gpu::Buffers all = buffers;
    buffers.aggregate = buffers.partial = nullptr;  // a and ranks again: what they are of did not change
    scene.rows = around(9);
    launch_front(scene, group);
    buffers = all;
    scene.rows = around(8);
    launch_experts(scene, group);
    scene.rows = around(3);
    launch_see(scene, group);
    scene.rows = around(2);
    launch_ffn(scene, group);
  }
  scene.rows = part.rows;
  if (part.pass == net.config.groups) return launch_tail(scene, weights.ends());
  std::swap(buffers.x[0], buffers.x[1]);
  launch_front(scene, weights.group(part.pass));
  if (part.rows.last == net.size.height) decide(scene, weights.group(part.pass), gpu::front_parts(scene));
}

}  // namespace seemore
