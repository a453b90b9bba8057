// The MoE block up to its pool: LayerNorm, 3x3 convolution, GELU, and of the pointwise convolution after it
//   a, after both stripes and GELU, and its sums over the image;
//   k projected to the ranks of all experts, and aggregated 4x4.
//
// Reads x, writes a and the ranks: 192 bytes a pixel for 36 channels. The stripes of three, with nothing between them,
// are one 3x3 stencil, whose bias depends on which rows are there.

#include "cuda/network/stages.h"
#include "cuda/network/walk.h"

namespace seemore::gpu {
namespace {

constexpr int kHalo = 4;  // columns: one for the stripes and one for the convolution; a strip begins with an aggregate
constexpr int kRing = kStep + 2;

struct Call {
  Walk walk;
  int channels, rank_chunks;
  void *x, *a, *ranks;
  float *aggregate, *partial;
  int64_t pixels;
  GroupWeights weights;
};

template <int kChannels>
int64_t shared_bytes(int columns) {
  return 2 * Ring<kChannels, kRing>::bytes(columns) + columns / 2 * kChannels * int64_t(sizeof(float));
}

// Sums of four rows and four columns of k, times the aggregation's weights: [upper, lower rows][column / 4][channel].
template <int kChannels>
struct Aggregates {
  float* sums;
  int columns;

  __device__ float* operator()(int half, int column) const {
    return sums + (half * (columns / 4) + column / 4) * kChannels;
  }

  // Adds up the unit's two rows; their number within the four is `row`.
  __device__ void write(const float (&k)[kPixels][kWords<kChannels>][2], const float* weights, const Unit& unit) const {
    const int x = unit.column % 4;
#pragma unroll
    for (int word = 0; word < kWords<kChannels>; ++word) {
      const int channel = channel_of(kChannels, word, unit.lane.quarter);
      const float2 upper = *reinterpret_cast<const float2*>(weights + (4 * unit.row + x) * kChannels + channel);
      const float2 lower = *reinterpret_cast<const float2*>(weights + (4 * unit.row + 4 + x) * kChannels + channel);
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        float2 sum;
        sum.x = k[right][word][0] * upper.x + k[2 + right][word][0] * lower.x;
        sum.y = k[right][word][1] * upper.y + k[2 + right][word][1] * lower.y;
#pragma unroll
        for (int lanes = 4; lanes <= 8; lanes *= 2) {  // of the four columns
          sum.x += __shfl_xor_sync(kAllLanes, sum.x, lanes);
          sum.y += __shfl_xor_sync(kAllLanes, sum.y, lanes);
        }
        if (x == 0) *reinterpret_cast<float2*>((*this)(unit.row / 2, unit.column + 8 * right) + channel) = sum;
      }
    }
  }
};

// Writes the unit's a (into a ring), ranks and aggregates, from the convolution's result.
template <class T, int kChannels>
__device__ void expand(const Call& call, const Part& part, const Unit& unit, int row,
                       const Ring<kChannels, kRing>& ring, const Aggregates<kChannels>& aggregates,
                       const uint32_t (&words)[kPixels][kWords<kChannels>]) {
  constexpr int kCount = kWords<kChannels>;
  const GroupWeights& weights = call.weights;
  float sums[kPixels][kCount][2], bias[kCount][2];
  read_channels<kChannels>(bias, weights.a_bias, unit.lane);
  fill(sums, bias);
  multiply<T>(sums, words, weights.a);
  for_pixels(call.walk, part, unit, row, [&](int p, int y, int, int64_t pixel) {
    uint32_t a[kCount];
    narrow<T, false>(a, sums[p]);
#pragma unroll
    for (uint32_t& word : a) word = pixel < 0 ? 0 : word;
    ring.features.write(ring(y - part.top, unit.column_of(p)), a, unit.lane);
  });

  if (row < part.top || row >= part.bottom) return;  // not the band's own
  read_channels<kChannels>(bias, weights.k_bias, unit.lane);
  fill(sums, bias);
  multiply<T>(sums, words, weights.k);
  aggregates.write(sums, weights.aggregate, unit);

  const int ranks = call.rank_chunks * kChunk;
  for (int chunk = 0; chunk < call.rank_chunks; ++chunk) {
    float projected[kPixels][2][2], start[2][2];
    const float4 four = *reinterpret_cast<const float4*>(weights.ranks_bias + chunk * kChunk + 4 * unit.lane.quarter);
    start[0][0] = four.x, start[0][1] = four.y, start[1][0] = four.z, start[1][1] = four.w;
    fill(projected, start);
    multiply<T>(projected, words, weights.ranks + chunk * quads_of(2, kCount) * kWarp);
    for_pixels(call.walk, part, unit, row, [&](int p, int y, int x, int64_t pixel) {
      uint32_t pair[2];
      narrow<T, false>(pair, projected[p]);
      if (!part.owns(y, x)) return;
      uint32_t* const to = static_cast<uint32_t*>(call.ranks) + (pixel * ranks + chunk * kChunk) / 2;
      *reinterpret_cast<uint2*>(to + 2 * unit.lane.quarter) = make_uint2(pair[0], pair[1]);
    });
  }
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kMostThreads, blocks_of(kChannels)) front_kernel(Call call) {
  constexpr int kCount = kWords<kChannels>;
  DYNAMIC_SHARED(char, memory);
  const Walk& walk = call.walk;
  const GroupWeights& weights = call.weights;
  const Part part(walk);
  const Unit unit(walk);
  const Ring<kChannels, kRing> normalised(memory, walk.columns);
  const Ring<kChannels, kRing> expanded(memory + Ring<kChannels, kRing>::bytes(walk.columns), walk.columns);
  const Aggregates<kChannels> aggregates{
      reinterpret_cast<float*>(memory + 2 * Ring<kChannels, kRing>::bytes(walk.columns)), walk.columns};
  const auto x = Features<kChannels>::at(call.x, call.pixels), a = Features<kChannels>::at(call.a, call.pixels);
  float total[kCount][2] = {};

  for (int row = part.top - kStep; row <= part.bottom; row += kStep) {
    const int next = row + 1 + unit.row, own = row + unit.row, last = row - 1 + unit.row;
    if (next <= part.bottom + 1) {
      norm_into<T>(normalised, x, weights.conv, call.channels, walk, part, unit, row + 1);
    }
    __syncthreads();
    if (own + 1 >= part.top - 1 && own <= part.bottom) {
      uint32_t words[kPixels][kCount];
      {
        float sums[kPixels][kCount][2];
        conv3x3<T>(sums, normalised, weights.conv, part, unit, row);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) narrow<T, true>(words[p], sums[p]);
      }
      expand<T>(call, part, unit, row, expanded, aggregates, words);
    }
    __syncthreads();
    if (last + 1 >= part.top && last < part.bottom) {
      uint32_t words[kPixels][kCount];
      stencil<T, 3, 3>(words, expanded, weights.stripes, weights.stripes_bias, part, unit, row - 1,
                       [&](int word, int i, int p, float sum) {
                         const int y = last + Unit::row_of(p), column = part.first + unit.column_of(p);
                         const float* const bias = weights.stripes_bias + channel_of(kChannels, word, unit.lane.quarter) + i;
                         if (y > 0) sum += bias[kChannels];
                         sum += bias[2 * kChannels];
                         if (y < walk.height - 1) sum += bias[3 * kChannels];
                         const float result = gelu_to<T>(sum);
                         if (part.owns(y, column)) total[word][i] += result;
                         return result;
                       });
      for_pixels(walk, part, unit, row - 1, [&](int p, int y, int column, int64_t pixel) {
        if (part.owns(y, column)) a.write(pixel, words[p], unit.lane);
      });
    }
    const int groups = walk.columns / 4, map_width = walk.width / 4, map_height = walk.height / 4;
    if (row < part.top || row >= part.bottom || row / 4 >= map_height) continue;
    for (int i = threadIdx.x; i < groups * kChannels; i += blockDim.x) {
      const int column = i / kChannels * 4, channel = i % kChannels, at = (part.first + column) / 4;
      if (!part.owns(row, part.first + column) || at >= map_width) continue;
      const int64_t pixel = (int64_t(part.image) * map_height + row / 4) * map_width + at;
      call.aggregate[pixel * kChannels + channel] =
          weights.aggregate_bias[channel] + (aggregates(0, column)[channel] + aggregates(1, column)[channel]);
    }
  }

  // The block's sums, in the order of its warps.
  float* const sums = reinterpret_cast<float*>(memory);
  __syncthreads();
#pragma unroll
  for (int word = 0; word < kCount; ++word) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = total[word][i];
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      const int channel = channel_of(kChannels, word, unit.lane.quarter) + i;
      if (unit.lane.pixel == 0) sums[threadIdx.x / kWarp * kChannels + channel] = sum;
    }
  }
  __syncthreads();
  const int64_t block = blockIdx.x % (walk.strips * walk.bands);
  for (int channel = threadIdx.x; channel < call.channels; channel += blockDim.x) {
    float sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += sums[warp * kChannels + channel];
    call.partial[(block * walk.images + part.image) * call.channels + channel] = sum;
  }
}

template <int kChannels>
Walk walk_of(const Scene& scene) {
  const int columns = columns_of(shared_bytes<kChannels>);
  return plan_walk(scene.net.size, columns, kHalo, kHalo, 4);
}

}  // namespace

int64_t front_parts(const Scene& scene) {
  int64_t parts = 0;
  with_features(DType::bfloat16, scene.channels(), [&](auto, auto channels) {
    const Walk walk = walk_of<decltype(channels)::value>(scene);
    parts = int64_t(walk.strips) * walk.bands;
  });
  return parts;
}

void launch_front(const Scene& scene, const GroupWeights& weights) {
  const Buffers& b = scene.buffers;
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const Walk walk = walk_of<kChannels>(scene);
    const Call call{walk, scene.channels(), scene.widths.rank_chunks, b.x[0], b.a, b.ranks, b.aggregate, b.partial,
                    scene.pixels(), weights};
    LAUNCH_LARGE((front_kernel<decltype(type), kChannels>), grid_of(walk.blocks(), "network"), walk.threads(),
                 shared_bytes<kChannels>(walk.columns), scene.stream, call);
  });
}

}  // namespace seemore::gpu
