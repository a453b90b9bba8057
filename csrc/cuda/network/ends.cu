// What stands before the groups and after them: the first convolution; conv_2 with the features of the first added, and
// the upsampler with its shuffle.
//
// The first convolution is computed again at the end, by which its result never goes to memory.

#include "cuda/network/launches.h"
#include "cuda/network/picture.h"

namespace seemore::gpu {
namespace {

struct HeadCall {
  Walk walk;
  Picture picture;
  FeatureMemory x;
  EndWeights weights;
};

template <class T, class Number, int kChannels>
__global__ void __launch_bounds__(threads_of(most_columns(kChannels)), blocks_of(kChannels))
    head_kernel(const __grid_constant__ HeadCall call) {
  constexpr int kCount = kWords<kChannels>;
  DYNAMIC_SHARED(char, memory);
  __shared__ Part part;
  part.find(call.walk);
  const Unit unit(call.walk);
  float sums[kPixels][kCount][2], bias[kCount][2];
  read_channels<kChannels>(bias, call.weights.first_bias, unit.lane);
  fill(sums, bias);
  const PictureTile tile(memory, call.walk.columns);
  add_first_conv<Number>(sums, tile, call.picture, call.weights, call.walk, part, unit, part.top);
  uint32_t words[kPixels][kCount];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) narrow<T>(words[p], sums[p]);
  write_own(Features<kChannels>{call.x}, words, call.walk, part, unit, part.top);
}

constexpr int kHalo = 2;  // of the upsampler, and of conv_2
constexpr int kRing = kStep + 2;

struct TailCall {
  Walk walk;
  Picture picture;
  int channels;
  FeatureMemory x;
  int outputs, chunks;
  EndWeights weights;
};

// Of an output: where it lies, from a pixel's first one on, and what is added to it.
struct Output {
  int64_t offset;
  float shift;
};

template <int kChannels>
int64_t shared_bytes(int columns, const Widths& widths) {
  return 3 * Ring<kChannels, kRing>::bytes(columns) + PictureTile::bytes(columns) +
         widths.outputs * int64_t(sizeof(Output));
}

// The block's rings, and the picture around its pixels.
template <int kChannels>
struct Shared {
  MatrixRing<kChannels, kRing> normalised, upper, lower;  // upper, lower: of the sum of conv_2 and conv_1
  PictureTile tile;
  Output* outputs;

  __device__ Shared(char* memory, int columns)
      : normalised(memory, columns),
        upper(memory + bytes(columns), columns),
        lower(memory + 2 * bytes(columns), columns),
        tile(memory + 3 * bytes(columns), columns),
        outputs(reinterpret_cast<Output*>(memory + 3 * bytes(columns) + PictureTile::bytes(columns))) {}
  static __device__ int64_t bytes(int columns) { return Ring<kChannels, kRing>::bytes(columns); }

  __device__ void find_outputs(const TailCall& call) const {
    const Picture& picture = call.picture;
    const int scale = picture.scale;
    for (int i = threadIdx.x; i < call.outputs; i += blockDim.x) {
      const int channel = i / (scale * scale), down = i / scale % scale, right = i % scale;
      outputs[i].offset = channel * picture.y.channel + down * picture.y.row + right * picture.y.column;
      outputs[i].shift = call.weights.upsampler_bias[i] * picture.inverse_range + picture.mean[channel];
    }
  }
};

// The sum of conv_2 and conv_1, of a step's rows from `row` of the band on.
template <class Number, int kChannels>
__device__ void compute_features(const Shared<kChannels>& shared, const TailCall& call, const Part& part, int row) {
  constexpr int kCount = kWords<kChannels>;
  const Unit unit(call.walk);
  row += part.top;
  float sums[kPixels][kCount][2], bias[kCount][2];
  read_channels<kChannels>(bias, call.weights.conv.bias, unit.lane);
  fill(sums, bias);
  add_first_conv<Number>(sums, shared.tile, call.picture, call.weights, call.walk, part, unit, row);
  if (row + unit.row + 1 < part.top - 1 || row + unit.row > part.bottom) return;
  conv3x3(sums, shared.normalised, call.weights.conv, part, unit, row);
  uint32_t words[kPixels][kCount];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    narrow<Upper>(words[p], sums[p]);
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      float upper[2];
      unpack_pair<Upper>(upper, words[p][word]);
      sums[p][word][0] -= upper[0], sums[p][word][1] -= upper[1];
    }
  }
  write_ring(shared.upper, row - part.top, words, call.walk, part, unit, row);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) narrow<Upper>(words[p], sums[p]);
  write_ring(shared.lower, row - part.top, words, call.walk, part, unit, row);
}

// The upsampler's outputs for a step's rows from `row` of the band on.
template <class Number, int kChannels>
__device__ void upsample(const Shared<kChannels>& shared, const TailCall& call, const Part& part, int row) {
  constexpr int kCount = kWords<kChannels>, kQuads = quads_of(kOutputTiles, kCount) * kWarp;
  const Unit unit(call.walk);
  const Picture& picture = call.picture;
  row += part.top;
  if (row + unit.row + 1 < part.top || row + unit.row >= part.bottom) return;
  Number* places[kPixels];
  bool is_own[kPixels];
  for_pixels(call.walk, part, unit, row, [&](int p, int y, int x, int64_t) {
    const int64_t offset = part.image * picture.y.batch + int64_t(y) * picture.scale * picture.y.row +
                           int64_t(x) * picture.scale * picture.y.column;
    places[p] = static_cast<Number*>(picture.y.data) + offset;
    is_own[p] = part.owns(y, x);
  });
#pragma unroll 1
  for (int chunk = 0; chunk < call.chunks; ++chunk) {
    const float none[kOutputTiles][2] = {};
    float sums[kPixels][kOutputTiles][2];
    fill(sums, none);
    for_taps(shared.upper, part, unit, row, [&](int tap, const auto& slots, const auto& at) {
      uint32_t words[kPixels][kCount];
      const int quads = (chunk * 9 + tap) * kQuads;
      const uint4* const weights[2] = {call.weights.upsampler[0] + quads, call.weights.upsampler[1] + quads};
      shared.lower.read(words, slots, at);
      multiply<Upper>(sums, words, weights[0]);
      shared.upper.read(words, slots, at);
      multiply<Upper>(sums, words, weights[1]);
      multiply<Upper>(sums, words, weights[0]);
    });
#pragma unroll
    for (int tile = 0; tile < kOutputTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int number = (chunk * kOutputTiles + tile) * 8 + 2 * unit.lane.quarter + i;
        if (number >= call.outputs) continue;
        const Output output = shared.outputs[number];
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const float value = sums[p][tile][i] * picture.inverse_range + output.shift;
          if (is_own[p]) places[p][output.offset] = picture.number_of<Number>(value);
        }
      }
    }
  }
}

template <class T, class Number, int kChannels>
__global__ void __launch_bounds__(threads_of(most_columns(kChannels)), blocks_of(kChannels))
    tail_kernel(const __grid_constant__ TailCall call) {
  DYNAMIC_SHARED(char, memory);
  __shared__ Part part;
  part.find(call.walk);
  const Shared<kChannels> shared(memory, call.walk.columns);
  shared.find_outputs(call);
  for (int row = -kStep; row <= call.walk.rows; row += kStep) {
    norm_into<T, 1>(shared.normalised, Features<kChannels>{call.x}, call.weights.conv, call.channels, call.walk, part,
                    row + 1);
    compute_features<Number>(shared, call, part, row);
    __syncthreads();
    upsample<Number>(shared, call, part, row - 1);
  }
}

Picture picture_of(const Scene& scene) {
  const Network& net = scene.net;
  return {net.x,
          net.y,
          net.max_value ? static_cast<float>(net.max_value) : 1,
          net.img_range,
          1 / net.img_range,
          net.mean,
          net.is_finite,
          static_cast<int>(net.config.in_channels),
          static_cast<int>(net.config.scale)};
}

// Call function(0 of the type of the images' numbers).
template <class Function>
void with_numbers(int64_t max_value, Function function) {
  if (max_value == 255) return function(uint8_t());
  if (max_value == 65535) return function(uint16_t());
  function(float());
}

}  // namespace

void launch_head(const Scene& scene, const EndWeights& weights) {
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    Walk walk = plan_walk(scene.net.size, scene.rows, most_columns(kChannels), 0, 0, 0);
    walk.rows = kStep, walk.bands = static_cast<int>(ceil_div(walk.stop - walk.start, kStep));
    const HeadCall call{walk, picture_of(scene), scene.features<kChannels>(scene.buffers.x[0]), weights};
    with_numbers(scene.net.max_value, [&](auto number) {
      LAUNCH((head_kernel<decltype(type), decltype(number), kChannels>), grid_of(walk.blocks(), "network"),
             walk.threads(), PictureTile::bytes(walk.columns), scene.stream, call);
    });
  });
}

void launch_tail(const Scene& scene, const EndWeights& weights) {
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const auto bytes = [&](int columns) { return shared_bytes<kChannels>(columns, scene.widths); };
    const int columns = columns_of(most_columns(kChannels), bytes);
    const Walk walk = plan_walk(scene.net.size, scene.rows, columns, kHalo, kHalo, 2 * kHalo);
    const TailCall call{walk,
                        picture_of(scene),
                        scene.channels(),
                        scene.features<kChannels>(scene.buffers.x[1]),
                        scene.widths.outputs,
                        scene.widths.output_chunks,
                        weights};
    with_numbers(scene.net.max_value, [&](auto number) {
      LAUNCH_LARGE((tail_kernel<decltype(type), decltype(number), kChannels>), grid_of(walk.blocks(), "network"),
                   walk.threads(), bytes(columns), scene.stream, call);
    });
  });
}

}  // namespace seemore::gpu
