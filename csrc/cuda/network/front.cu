// The MoE block up to its pool: LayerNorm, 3x3 convolution, GELU, and of the pointwise convolution after it
//   a, after both stripes and GELU, and its sums over the image;
//   k projected to the ranks of all experts, and aggregated 4x4.
//
// Reads x, writes a and the ranks: 192 bytes a pixel for 36 channels. The stripes of three, with nothing between them,
// are one 3x3 stencil, whose bias depends on which rows are there.

#include "cuda/network/launches.h"
#include "cuda/network/rings.h"

namespace seemore::gpu {
namespace {

constexpr int kHalo = 4;  // columns: one for the stripes and one for the convolution; a strip begins with an aggregate
constexpr int kRing = kStep + 2;

struct Call {
  Walk walk;
  int channels, rank_chunks;
  FeatureMemory x, a;
  void* ranks;
  float *aggregate, *partial;
  GroupWeights weights;
};

template <int kChannels>
int64_t shared_bytes(int columns) {
  return 2 * Ring<kChannels, kRing>::bytes(columns) + (columns / 2 + columns / 8) * kChannels * int64_t(sizeof(float));
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

// The block's rings, and aggregates.
template <int kChannels>
struct Shared {
  MatrixRing<kChannels, kRing> normalised;
  Ring<kChannels, kRing> expanded;
  Aggregates<kChannels> aggregates;
  float* sums;  // of a: [warp][channel]
};

// Writes the ranks of k, projected from the convolution's result.
template <int kChannels>
__device__ void write_ranks(const Call& call, const Part& part, const Unit& unit, int row,
                            const uint32_t (&words)[kPixels][kWords<kChannels>]) {
  const int ranks = call.rank_chunks * kChunk;
#pragma unroll 1
  for (int chunk = 0; chunk < call.rank_chunks; ++chunk) {
    float sums[kPixels][2][2];
    const int rank = chunk * kChunk + 4 * unit.lane.quarter;
    const float4 four = *reinterpret_cast<const float4*>(call.weights.ranks_bias + rank);
    const float bias[2][2] = {{four.x, four.y}, {four.z, four.w}};
    multiply<Operand>(sums, words, call.weights.ranks + chunk * quads_of(2, kWords<kChannels>) * kWarp, bias);
    for_pixels(call.walk, part, unit, row, [&](int p, int y, int x, int64_t pixel) {
      uint32_t pair[2];
      narrow<Operand>(pair, sums[p]);
      if (!part.owns(y, x)) return;
      uint32_t* const to = static_cast<uint32_t*>(call.ranks) + (pixel * ranks + chunk * kChunk) / 2;
      *reinterpret_cast<uint2*>(to + 2 * unit.lane.quarter) = make_uint2(pair[0], pair[1]);
    });
  }
}

// The convolution of a step's rows from `row` of the band on, and what is expanded of it: a into its ring, k's ranks
// and aggregates.
template <class T, int kChannels>
__device__ void expand(const Shared<kChannels>& shared, const Call& call, const Part& part, int row) {
  constexpr int kCount = kWords<kChannels>;
  const GroupWeights& weights = call.weights;
  const Unit unit(call.walk);
  row += part.top;
  if (row + unit.row + 1 < part.top - 1 || row + unit.row > part.bottom) return;
  uint32_t words[kPixels][kCount];
  float sums[kPixels][kCount][2];
  float bias[kCount][2];
  read_channels<kChannels>(bias, weights.conv.bias, unit.lane);
  fill(sums, bias);
  conv3x3(sums, shared.normalised, weights.conv, part, unit, row);
  gelu_all<T>(words, sums);

  pointwise(sums, words, weights.a, weights.a_bias, unit);
  uint32_t a[kPixels][kCount];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) narrow<Operand>(a[p], sums[p]);
  write_ring(shared.expanded, row - part.top, a, call.walk, part, unit, row);

  if (row < part.top || row >= part.bottom) return;  // not the band's own
  pointwise(sums, words, weights.k, weights.k_bias, unit);
  shared.aggregates.write(sums, weights.aggregate, unit);
  write_ranks<kChannels>(call, part, unit, row, words);
}

// a of a step's rows from `row` of the band on, which is added to the warp's sums.
template <class T, int kChannels>
__device__ void finish_a(const Shared<kChannels>& shared, const Call& call, const Part& part, int row) {
  const Unit unit(call.walk);
  row += part.top;
  const int first = row + unit.row;
  if (first + 1 < part.top || first >= part.bottom) return;
  uint32_t words[kPixels][kWords<kChannels>];
  const auto taps = Features<kChannels>::at(call.weights.stripes, kStripes);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int y = first + Unit::row_of(p);
    taps.read(words[p], 9 + (y > 0) + 2 * (y < call.walk.height - 1), unit.lane);
  }
  depthwise<3, 3>(words, shared.expanded, taps, part, unit, row);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
#pragma unroll
    for (uint32_t& word : words[p]) word = gelu_of_doubles<T>(word);
  }
  write_own(Features<kChannels>{call.a}, words, call.walk, part, unit, row);
  part_of_work();
  float* const sums = shared.sums + threadIdx.x / kWarp * kChannels;
#pragma unroll
  for (int word = 0; word < kWords<kChannels>; ++word) {
    float total[2] = {};
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      float pair[2];
      unpack_pair<Operand>(pair, words[p][word]);
      if (!part.owns(first + Unit::row_of(p), part.first + unit.column_of(p))) continue;
      total[0] += pair[0], total[1] += pair[1];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) total[i] += __shfl_xor_sync(kAllLanes, total[i], lanes);
      if (unit.lane.pixel == 0) sums[channel_of(kChannels, word, unit.lane.quarter) + i] += total[i];
    }
  }
}

// Adds up both halves of the aggregates of the four rows from `row` of the band on.
template <int kChannels>
__device__ void write_aggregates(const Aggregates<kChannels>& aggregates, const Call& call, const Part& part, int row) {
  row += part.top;
  const Walk& walk = call.walk;
  const int map_width = walk.width / 4, map_height = walk.height / 4;
  if (row < part.top || row >= part.bottom || row / 4 >= map_height) return;
  for (int i = forgotten(threadIdx.x); i < walk.columns / 4 * kChannels; i += blockDim.x) {
    const int column = i / kChannels * 4, channel = i % kChannels, at = (part.first + column) / 4;
    if (!part.owns(row, part.first + column) || at >= map_width) continue;
    const int64_t pixel = (int64_t(part.image) * map_height + row / 4) * map_width + at;
    call.aggregate[pixel * kChannels + channel] =
        call.weights.aggregate_bias[channel] + (aggregates(0, column)[channel] + aggregates(1, column)[channel]);
  }
}

// Writes the sums of the block's warps, in their order.
template <int kChannels>
__device__ void write_sums(const Shared<kChannels>& shared, const Call& call, const Part& part) {
  const Walk& walk = call.walk;
  const int64_t block = int64_t(part.top / walk.rows) * walk.strips + blockIdx.x % walk.strips;
  for (int channel = threadIdx.x; channel < call.channels; channel += blockDim.x) {
    float sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
      sum += shared.sums[warp * kChannels + channel];
    }
    call.partial[(block * walk.images + part.image) * call.channels + channel] = sum;
  }
}

template <class T, int kChannels>
__global__ void __launch_bounds__(threads_of(most_columns(kChannels)), blocks_of(kChannels))
    front_kernel(const __grid_constant__ Call call) {
  DYNAMIC_SHARED(char, memory);
  __shared__ Part part;
  part.find(call.walk);
  const int columns = call.walk.columns;
  const int64_t ring_bytes = Ring<kChannels, kRing>::bytes(columns);
  float* const floats = reinterpret_cast<float*>(memory + 2 * ring_bytes);
  const Shared<kChannels> shared{
      {memory, columns}, {memory + ring_bytes, columns}, {floats, columns}, floats + columns / 2 * kChannels};
  for (int i = threadIdx.x; i < static_cast<int>(blockDim.x) / kWarp * kChannels; i += blockDim.x) shared.sums[i] = 0;
  for (int row = -kStep; row <= call.walk.rows; row += kStep) {
    norm_into<T, 1>(shared.normalised, Features<kChannels>{call.x}, call.weights.conv, call.channels, call.walk, part,
                    row + 1);
    __syncthreads();
    expand<T>(shared, call, part, row);
    __syncthreads();
    finish_a<T>(shared, call, part, row - 1);
    if (call.aggregate) write_aggregates(shared.aggregates, call, part, row);
  }
  __syncthreads();
  if (call.partial) write_sums(shared, call, part);
}

constexpr int kMostRows = 128;  // of a band, such that streamed images have bands of as few

// The order of the pool's sums depends on strips and bands. So these are those of the whole image, and of it alone.
template <int kChannels>
Walk whole_walk(const Scene& scene) {
  const int columns = columns_of(most_columns(kChannels), shared_bytes<kChannels>);
  Size size = scene.net.size;
  size.batch = 1;
  return plan_walk(size, {0, size.height}, columns, kHalo, kHalo, 4, kMostRows);
}

}  // namespace

int64_t front_parts(const Scene& scene) {
  int64_t parts = 0;
  with_features(DType::bfloat16, scene.channels(), [&](auto, auto channels) {
    const Walk walk = whole_walk<decltype(channels)::value>(scene);
    parts = int64_t(walk.strips) * walk.bands;
  });
  return parts;
}

int64_t front_rows(const Scene& scene) {
  int64_t rows = 0;
  with_features(DType::bfloat16, scene.channels(),
                [&](auto, auto channels) { rows = whole_walk<decltype(channels)::value>(scene).rows; });
  return rows;
}

void launch_front(const Scene& scene, const GroupWeights& weights) {
  const Buffers& b = scene.buffers;
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    Walk walk = whole_walk<kChannels>(scene);
    walk.images = scene.net.size.batch;
    walk.start = static_cast<int>(scene.rows.first), walk.stop = static_cast<int>(scene.rows.last);
    walk.bands = static_cast<int>(ceil_div(walk.stop - walk.start, walk.rows));
    const Call call{walk,
                    scene.channels(),
                    scene.widths.rank_chunks,
                    scene.features<kChannels>(b.x[0]),
                    scene.features<kChannels>(b.a),
                    scene.ranks(),
                    b.aggregate,
                    b.partial,
                    weights};
    LAUNCH_LARGE((front_kernel<decltype(type), kChannels>), grid_of(walk.blocks(), "network"), walk.threads(),
                 shared_bytes<kChannels>(walk.columns), scene.stream, call);
  });
}

}  // namespace seemore::gpu
