// The small map: k, aggregated once by `front`, aggregated again, convolved 3x3 and projected to the experts' ranks.
//
// A block has kColumns pixels of a row; its three rows are aggregated three times, which costs less than a launch.

#include "cuda/network/launches.h"

namespace seemore::gpu {
namespace {

constexpr int kThreads = 256, kColumns = 16, kRows = 3;

struct Call {
  const float* aggregate;
  float* small;
  int height, width;              // of the small map
  int first_height, first_width;  // of `aggregate`
  int ranks, tiles;               // tiles: of a row
  GroupWeights weights;
};

// k after so many aggregations, and GELU; of one channel.
template <int kLevel, int kChannels>
__device__ float aggregated(const Call& call, int image, int y, int x, int channel) {
  if constexpr (kLevel == 1) {
    return gelu(
        call.aggregate[((int64_t(image) * call.first_height + y) * call.first_width + x) * kChannels + channel]);
  } else {
    float sum = call.weights.aggregate_bias[channel];
    for (int tap = 0; tap < 16; ++tap) {
      sum += call.weights.aggregate[tap * kChannels + channel] *
             aggregated<kLevel - 1, kChannels>(call, image, 4 * y + tap / 4, 4 * x + tap % 4, channel);
    }
    return gelu(sum);
  }
}

template <int kLevel, int kChannels>
__global__ void __launch_bounds__(kThreads) small_map_kernel(Call call) {
  __shared__ float seen[kRows][kColumns + 2][kChannels], convolved[kColumns][kChannels];
  const int first = blockIdx.x % call.tiles * kColumns, y = blockIdx.x / call.tiles % call.height;
  const int image = blockIdx.x / call.tiles / call.height;
  for (int i = threadIdx.x; i < kRows * (kColumns + 2) * kChannels; i += kThreads) {
    const int channel = i % kChannels, column = i / kChannels % (kColumns + 2), row = i / kChannels / (kColumns + 2);
    const int at_y = y + row - 1, at_x = first + column - 1;
    const bool is_inside = at_y >= 0 && at_y < call.height && at_x >= 0 && at_x < call.width;
    seen[row][column][channel] = is_inside ? aggregated<kLevel, kChannels>(call, image, at_y, at_x, channel) : 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * kChannels; i += kThreads) {
    const int channel = i % kChannels, column = i / kChannels;
    float sum = call.weights.calibrate_bias[channel];
    for (int tap = 0; tap < 9; ++tap) {
      sum += call.weights.calibrate[tap * kChannels + channel] * seen[tap / 3][column + tap % 3][channel];
    }
    convolved[column][channel] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * call.ranks; i += kThreads) {
    const int rank = i % call.ranks, column = i / call.ranks;
    if (first + column >= call.width) continue;
    float sum = call.weights.small_bias[rank];
    for (int channel = 0; channel < kChannels; ++channel) {
      sum += call.weights.small[rank * kChannels + channel] * convolved[column][channel];
    }
    call.small[((int64_t(image) * call.height + y) * call.width + first + column) * call.ranks + rank] = sum;
  }
}

}  // namespace

void launch_small_map(const Scene& scene, const GroupWeights& weights) {
  const int64_t levels = scene.config().recursive;
  const Size map = scene.map(levels), first = scene.map(1);
  const int height = static_cast<int>(map.height), width = static_cast<int>(map.width);
  const int tiles = static_cast<int>(ceil_div(width, kColumns));
  const Call call{scene.buffers.aggregate,       scene.buffers.small,  height, width,  static_cast<int>(first.height),
                  static_cast<int>(first.width), scene.widths.ranks(), tiles,  weights};
  const auto launch = [&](auto level) {
    with_features(DType::bfloat16, scene.channels(), [&](auto, auto channels) {
      LAUNCH((small_map_kernel<decltype(level)::value, decltype(channels)::value>),
             grid_of(map.batch * height * tiles, "network"), kThreads, 0, scene.stream, call);
    });
  };
  if (levels == 1) return launch(std::integral_constant<int, 1>());
  if (levels == 2) return launch(std::integral_constant<int, 2>());
  launch(std::integral_constant<int, kMostLevels>());
}

}  // namespace seemore::gpu
