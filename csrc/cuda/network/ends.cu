// What stands before the groups and after them: the first convolution, conv_2 with the features of the first added, and
// the upsampler with its shuffle. The picture itself travels through them: they are as accurate as float32.

#include "cuda/network/launches.h"
#include "cuda/network/rings.h"

namespace seemore::gpu {
namespace {

constexpr int kHeadThreads = 256;
constexpr int kHeadColumns = 4;  // of a thread, with a quarter of the channels
constexpr int kRing = kStep + 2;
using Upper = __nv_bfloat16;  // of a float, and of what it leaves: together 16 bits of it

// The images, and what turns their numbers into those of the network.
struct Picture {
  Image x, y;
  float max_value;  // 255 of uint8, 65535 of uint16, 1 of float32
  float img_range, inverse_range;
  const float* mean;  // of each channel
  int* is_finite;     // null, or 1 until a result is not
  int channels, scale;

  // The number at an offset of x, from 0 to 1.
  __device__ float read(int64_t offset) const {
    if (max_value == 1) return static_cast<const float*>(x.data)[offset];
    const bool is_byte = max_value == 255;
    return (is_byte ? static_cast<const uint8_t*>(x.data)[offset] : static_cast<const uint16_t*>(x.data)[offset]) /
           max_value;
  }

  // Integers are rounded to the nearest, ties to even.
  template <class Number>
  __device__ Number number_of(float value) const {
    if constexpr (std::is_same_v<Number, float>) {
      return value;
    } else {
      if (is_finite && !(fabsf(value) < INFINITY)) *is_finite = 0;
      return static_cast<Number>(rintf(fminf(fmaxf(value, 0), 1) * max_value));
    }
  }
};

struct HeadCall {
  Picture picture;
  int64_t images;
  int height, width;
  FeatureMemory x;
  float* f;
  EndWeights weights;
};

template <class T, int kChannels>
__global__ void __launch_bounds__(kHeadThreads, blocks_of(kChannels))
    head_kernel(const __grid_constant__ HeadCall call) {
  constexpr int kCount = kWords<kChannels>;
  const Picture& picture = call.picture;
  const Lane lane;
  const int across = static_cast<int>(ceil_div(call.width, kHeadColumns));
  const int64_t item = (int64_t(blockIdx.x) * kHeadThreads + threadIdx.x) / 4;
  const int first = item % across * kHeadColumns;
  const int64_t row = item / across, image = row / call.height;
  const int y = row % call.height;
  if (image >= call.images) return;
  float sums[kHeadColumns][kCount][2], bias[kCount][2];
  read_channels<kChannels>(bias, call.weights.first_bias, lane);
  fill(sums, bias);
  for (int channel = 0; channel < picture.channels; ++channel) {
    const float mean = picture.mean[channel];
    for (int down = 0; down < 3; ++down) {
      const int at_y = y + down - 1;
      if (at_y < 0 || at_y >= call.height) continue;
      const int64_t offset = image * picture.x.batch + channel * picture.x.channel + at_y * picture.x.row;
      float values[kHeadColumns + 2];
#pragma unroll
      for (int i = 0; i < kHeadColumns + 2; ++i) {
        const int x = first + i - 1;
        values[i] = 0;
        if (x < 0 || x >= call.width) continue;
        values[i] = (picture.read(offset + x * picture.x.column) - mean) * picture.img_range;
      }
#pragma unroll
      for (int right = 0; right < 3; ++right) {
        float weight[kCount][2];
        read_channels<kChannels>(weight, call.weights.first + (channel * 9 + down * 3 + right) * kChannels, lane);
#pragma unroll
        for (int p = 0; p < kHeadColumns; ++p) {
#pragma unroll
          for (int word = 0; word < kCount; ++word) {
            sums[p][word][0] += weight[word][0] * values[p + right];
            sums[p][word][1] += weight[word][1] * values[p + right];
          }
        }
      }
    }
  }
  const Features<kChannels> features{call.x};
#pragma unroll
  for (int p = 0; p < kHeadColumns; ++p) {
    if (first + p >= call.width) continue;
    const int64_t pixel = row * call.width + first + p;
    uint32_t words[kCount];
    narrow<T>(words, sums[p]);
    features.write(pixel, words, lane);
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      float* const to = call.f + pixel * kChannels + channel_of(kChannels, word, lane.quarter);
      *reinterpret_cast<float2*>(to) = make_float2(sums[p][word][0], sums[p][word][1]);
    }
  }
}

struct FeaturesCall {
  Walk walk;
  int channels;
  FeatureMemory x, upper, lower;
  const float* f;
  ConvWeights weights;
};

template <int kChannels>
int64_t shared_bytes(int columns) {
  return Ring<kChannels, kRing>::bytes(columns);
}

// The sum of conv_2 and f, of a step's rows from `row` of the band on.
template <int kChannels>
__device__ void finish(const MatrixRing<kChannels, kRing>& normalised, const FeaturesCall& call, const Part& part,
                       int row) {
  constexpr int kCount = kWords<kChannels>;
  const Unit unit(call.walk);
  row += part.top;
  if (row < part.top || row + unit.row >= part.bottom) return;
  const Features<kChannels> upper{call.upper}, lower{call.lower};
  float sums[kPixels][kCount][2];
  conv3x3(sums, normalised, call.weights, part, unit, row);
  for_pixels(call.walk, part, unit, row, [&](int p, int y, int column, int64_t pixel) {
    if (!part.owns(y, column)) return;
    float f[kCount][2];
    read_channels<kChannels>(f, call.f + pixel * kChannels, unit.lane);
    uint32_t words[kCount];
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      sums[p][word][0] += f[word][0], sums[p][word][1] += f[word][1];
    }
    narrow<Upper>(words, sums[p]);
    upper.write(pixel, words, unit.lane);
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      float wide[2];
      unpack_pair<Upper>(wide, words[word]);
      words[word] = pack_pair<Upper>(sums[p][word][0] - wide[0], sums[p][word][1] - wide[1]);
    }
    lower.write(pixel, words, unit.lane);
  });
}

template <class T, int kChannels>
__global__ void __launch_bounds__(threads_of(most_columns(kChannels)), blocks_of(kChannels))
    features_kernel(const __grid_constant__ FeaturesCall call) {
  DYNAMIC_SHARED(char, memory);
  __shared__ Part part;
  part.find(call.walk);
  const MatrixRing<kChannels, kRing> normalised(memory, call.walk.columns);
  for (int row = -kStep; row < call.walk.rows; row += kStep) {
    norm_into<T, 0>(normalised, Features<kChannels>{call.x}, call.weights, call.channels, call.walk, part, row + 1);
    __syncthreads();
    finish(normalised, call, part, row);
    __syncthreads();
  }
}

struct UpsamplerCall {
  Walk walk;
  Picture picture;
  FeatureMemory upper, lower;
  int outputs, chunks;
  EndWeights weights;
};

template <class Number, int kChannels, int kTiles>
__global__ void __launch_bounds__(threads_of(most_columns(kChannels)), 1)
    upsampler_kernel(const __grid_constant__ UpsamplerCall call) {
  constexpr int kCount = kWords<kChannels>, kQuads = quads_of(kTiles, kCount) * kWarp;
  const Walk& walk = call.walk;
  const Picture& picture = call.picture;
  __shared__ Part part;
  part.find(walk);
  const Unit unit(walk);
  const Features<kChannels> upper{call.upper}, lower{call.lower};
  const int scale = picture.scale;
  for (int chunk = 0; chunk < call.chunks; ++chunk) {
    float sums[kPixels][kTiles][2], bias[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float* const from = call.weights.upsampler_bias + (chunk * kTiles + tile) * 8 + 2 * unit.lane.quarter;
      bias[tile][0] = from[0], bias[tile][1] = from[1];
    }
    fill(sums, bias);
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
      uint32_t words[kPixels][kCount];
      Part shifted = part;
      shifted.first += tap % 3 - 1;
      const uint4* const weights[2] = {call.weights.upsampler[0] + (chunk * 9 + tap) * kQuads,
                                       call.weights.upsampler[1] + (chunk * 9 + tap) * kQuads};
      read_pixels(words, lower, walk, shifted, unit, part.top + tap / 3 - 1);
      multiply<Upper>(sums, words, weights[0]);
      read_pixels(words, upper, walk, shifted, unit, part.top + tap / 3 - 1);
      multiply<Upper>(sums, words, weights[1]);
      multiply<Upper>(sums, words, weights[0]);
    }
    int64_t places[kPixels];
    for_pixels(walk, part, unit, part.top, [&](int p, int y, int x, int64_t) {
      places[p] = part.owns(y, x) ? int64_t(y) * scale * picture.y.row + int64_t(x) * scale * picture.y.column : -1;
    });
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int output = (chunk * kTiles + tile) * 8 + 2 * unit.lane.quarter + i;
        if (output >= call.outputs) continue;
        const int channel = output / (scale * scale), down = output / scale % scale, right = output % scale;
        Number* const to = static_cast<Number*>(picture.y.data) + part.image * picture.y.batch +
                           channel * picture.y.channel + down * picture.y.row + right * picture.y.column;
        const float mean = picture.mean[channel];
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const float value = sums[p][tile][i] * picture.inverse_range + mean;
          if (places[p] >= 0) to[places[p]] = picture.number_of<Number>(value);
        }
      }
    }
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

template <class Function>
void with_tiles(int tiles, Function function) {
  if (tiles == 2) return function(std::integral_constant<int, 2>());
  if (tiles == 4) return function(std::integral_constant<int, 4>());
  function(std::integral_constant<int, kOutputTiles>());
}

}  // namespace

void launch_head(const Scene& scene, const EndWeights& weights) {
  const Size& size = scene.net.size;
  const int64_t threads = size.batch * size.height * ceil_div(size.width, kHeadColumns) * 4;
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const HeadCall call{picture_of(scene),
                        size.batch,
                        static_cast<int>(size.height),
                        static_cast<int>(size.width),
                        scene.features<kChannels>(scene.buffers.x[0]),
                        scene.buffers.f,
                        weights};
    LAUNCH((head_kernel<decltype(type), kChannels>), grid_of(ceil_div(threads, kHeadThreads), "network"), kHeadThreads,
           0, scene.stream, call);
  });
}

void launch_features(const Scene& scene, const EndWeights& weights) {
  const Buffers& b = scene.buffers;
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const int columns = columns_of(most_columns(kChannels), shared_bytes<kChannels>);
    const Walk walk = plan_walk(scene.net.size, columns, 1, 1, 2);
    const FeaturesCall call{walk,
                            scene.channels(),
                            scene.features<kChannels>(b.x[1]),
                            scene.features<kChannels>(b.x[0]),
                            scene.features<kChannels>(b.a),
                            b.f,
                            weights.conv};
    LAUNCH_LARGE((features_kernel<decltype(type), kChannels>), grid_of(walk.blocks(), "network"), walk.threads(),
                 shared_bytes<kChannels>(columns), scene.stream, call);
  });
}

void launch_upsampler(const Scene& scene, const EndWeights& weights) {
  with_features(DType::bfloat16, scene.channels(), [&](auto, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    Walk walk = plan_walk(scene.net.size, most_columns(kChannels), 0, 0, 0);
    walk.rows = kStep, walk.bands = static_cast<int>(ceil_div(walk.height, kStep));
    const UpsamplerCall call{walk,
                             picture_of(scene),
                             scene.features<kChannels>(scene.buffers.x[0]),
                             scene.features<kChannels>(scene.buffers.a),
                             scene.widths.outputs,
                             scene.widths.output_chunks,
                             weights};
    with_tiles(scene.widths.output_tiles, [&](auto tiles) {
      with_numbers(scene.net.max_value, [&](auto number) {
        LAUNCH((upsampler_kernel<decltype(number), kChannels, decltype(tiles)::value>),
               grid_of(walk.blocks(), "network"), walk.threads(), 0, scene.stream, call);
      });
    });
  });
}

}  // namespace seemore::gpu
