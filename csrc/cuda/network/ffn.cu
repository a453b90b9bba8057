// GatedFFN with its LayerNorm and residual; alone, as it ends SME, or after the experts, as it ends RME.
//
// A step computes the rows of LN(x) and of g, the half that is convolved, into rings in shared memory. The other half,
// u, is computed where it is used. After the experts, their result is kept in a third ring: it never goes to memory.
// Reads x and writes it: 160 bytes a pixel for 36 channels; with experts 272.

#include "cuda/common/axis.h"
#include "cuda/network/launches.h"
#include "cuda/network/rings.h"

namespace seemore::gpu {
namespace {

constexpr int kHalo = 1;
constexpr int kRing = kStep + 2;

struct ExpertsCall {
  FeatureMemory a;
  const uint32_t* ranks;
  const float* small;
  const int64_t* index;
  const float* weight;
  int top_k, rank_chunks;
  int8_t expert[kMostRanks];  // of each rank, -1 behind the last
  Axis<float> down, across;
  uint4 *project_a, *mix, *mix_ranks;
  float *project_a_bias, *mix_bias, *experts_bias;
};

struct Call {
  Walk walk;
  int channels;
  FeatureMemory x, y;
  FfnWeights weights;
  ExpertsCall experts;
};

// Quads of a chunk's part of the projection.
constexpr __host__ __device__ int mix_quads(int channels) { return quads_of(channels / 8, 2) * kWarp; }

template <int kChannels, bool kExperts>
int64_t shared_bytes(int columns) {
  return (2 + kExperts) * Ring<kChannels, kRing>::bytes(columns) +
         kExperts * (kChannels + kMostRanks + kMostRanks / kChunk * mix_quads(kChannels) * 4) * int64_t(sizeof(float));
}

// The experts that the block's image chose.
struct Choice {
  float *share, *bias;  // of each rank: its expert's probability, or 0; of each channel
  uint32_t* mix;        // mix_ranks, with 0 for those of other experts, which may hold anything

  template <int kChannels>
  __device__ void read(const ExpertsCall& call, int image) const {
    read_shares<kChannels>(call, image);
    __syncthreads();
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(call.mix_ranks);
    for (int i = threadIdx.x; i < call.rank_chunks * mix_quads(kChannels) * 4; i += blockDim.x) {
      const int chunk = i / (4 * mix_quads(kChannels)), lane = i / 4 % kWarp;
      const int rank = chunk * kChunk + 4 * (lane % 4) + 2 * (i % 2);  // and the next one
      mix[i] = from[i] & ((share[rank] == 0 ? 0 : 0xffff) | (share[rank + 1] == 0 ? 0 : 0xffff0000));
    }
    __syncthreads();
  }

  template <int kChannels>
  __device__ void read_shares(const ExpertsCall& call, int image) const {
    const int64_t* const index = call.index + image * call.top_k;
    const float* const weight = call.weight + image * call.top_k;
    for (int i = threadIdx.x; i < kMostRanks + kChannels; i += blockDim.x) {
      float sum = i < kMostRanks ? 0 : call.mix_bias[i - kMostRanks];
      for (int n = 0; n < call.top_k; ++n) {
        if (i >= kMostRanks) {
          sum += weight[n] * call.experts_bias[index[n] * kChannels + i - kMostRanks];
        } else if (call.expert[i] == index[n]) {
          sum = weight[n];
        }
      }
      (i < kMostRanks ? share + i : bias + (i - kMostRanks))[0] = sum;
    }
  }
};

// The places of a row's two pixels on the small map, in floats: that before each and that after it.
struct MapPlaces {
  int rows[2], columns[2][2];
  float down, right[2];  // shares of those after

  __device__ MapPlaces(const ExpertsCall& call, int y, int x) {
    const int ranks = call.rank_chunks * kChunk, width = call.across.small * ranks;
    const float row = call.down.position(y);
    const int above = call.down.before(row);
    down = row - above;
    rows[0] = above * width, rows[1] = call.down.after(above) * width;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float column = call.across.position(x + 8 * i);
      const int left = call.across.before(column);
      right[i] = column - left;
      columns[i][0] = left * ranks, columns[i][1] = call.across.after(left) * ranks;
    }
  }

  // Four ranks from `map` on, at pixel i.
  __device__ void interpolate(float (&to)[4], const float* map, int i) const {
    float sides[2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float4 left = *reinterpret_cast<const float4*>(map + rows[side] + columns[i][0]);
      const float4 other = *reinterpret_cast<const float4*>(map + rows[side] + columns[i][1]);
      sides[side][0] = left.x + right[i] * (other.x - left.x), sides[side][1] = left.y + right[i] * (other.y - left.y);
      sides[side][2] = left.z + right[i] * (other.z - left.z), sides[side][3] = left.w + right[i] * (other.w - left.w);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) to[n] = sides[0][n] + down * (sides[1][n] - sides[0][n]);
  }
};

// What the experts of a chunk make of a row's two pixels of a, times their shares.
template <int kCount>
__device__ void modulate(uint32_t (&to)[2][2], const uint32_t (&a)[2][kCount], const Call& call, const Choice& choice,
                         const Part& part, const Unit& unit, int y, int chunk) {
  part_of_work();
  const ExpertsCall& experts = call.experts;
  const int rank = chunk * kChunk + 4 * unit.lane.quarter, ranks = experts.rank_chunks * kChunk;
  const int x = part.first + unit.column;
  float product[2][2][2];
  const float4 four = *reinterpret_cast<const float4*>(experts.project_a_bias + rank);
  const float bias[2][2] = {{four.x, four.y}, {four.z, four.w}};
  multiply<Operand>(product, a, experts.project_a + chunk * quads_of(2, kCount) * kWarp, bias);
  const int64_t map_pixels = int64_t(experts.down.small) * experts.across.small;
  const float* const map = experts.small + part.image * map_pixels * ranks + rank;
  const MapPlaces places(experts, y, x);
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    to[p][0] = to[p][1] = 0;
    if (y < 0 || y >= call.walk.height || x + 8 * p < 0 || x + 8 * p >= call.walk.width) continue;
    const int64_t pixel = (int64_t(part.image) * call.walk.height + y) * call.walk.width + x + 8 * p;
    const uint2 pair = *reinterpret_cast<const uint2*>(experts.ranks + (pixel * ranks + rank) / 2);
    float k[2][2], s[4];
    unpack_pair<Operand>(k[0], pair.x), unpack_pair<Operand>(k[1], pair.y);
    places.interpolate(s, map, p);
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      float z[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float share = choice.share[rank + 2 * word + i];  // an expert not chosen may have overflown
        z[i] = share == 0 ? 0 : share * ((k[word][i] + s[2 * word + i]) * product[p][word][i]);
      }
      to[p][word] = pack_pair<Operand>(z[0], z[1]);
    }
  }
}

// words = x + what the chosen experts make of a and k, projected; of a step's rows from `row` on.
template <class T, int kChannels>
__device__ void read_experts(uint32_t (&words)[kPixels][kWords<kChannels>], const Call& call, const Choice& choice,
                             const Part& part, const Unit& unit, int row) {
  constexpr int kCount = kWords<kChannels>;
  const ExpertsCall& experts = call.experts;
  uint32_t a[kPixels][kCount];
  read_pixels(a, Features<kChannels>{experts.a}, call.walk, part, unit, row);
  float sums[kPixels][kCount][2];
  pointwise(sums, a, experts.mix, choice.bias, unit);
#pragma unroll 1
  for (int chunk = 0; chunk < experts.rank_chunks; ++chunk) {
    uint32_t modulated[kPixels][2];
#pragma unroll
    for (int below = 0; below < kUnitRows; ++below) {
      modulate(rows_of<2>(modulated, below), rows_of<2>(a, below), call, choice, part, unit, row + unit.row + below,
               chunk);
    }
    multiply<Operand>(sums, modulated, reinterpret_cast<const uint4*>(choice.mix) + chunk * mix_quads(kChannels));
  }
  read_pixels(words, Features<kChannels>{call.x}, call.walk, part, unit, row);
  add_to<T, false>(words, sums);
}

// The block's rings, and what its image chose.
template <int kChannels>
struct Shared {
  Ring<kChannels, kRing> normalised, g, kept;  // kept: x after the experts
  Choice choice;
};

// g of a step's rows from `row` of the band on.
template <class T, bool kExperts, int kChannels>
__device__ void compute_g(const Shared<kChannels>& shared, const Call& call, const Part& part, int row) {
  const Unit unit(call.walk);
  row += part.top;
  if (row + unit.row + 1 < part.top - 1 || row + unit.row > part.bottom) return;
  uint32_t words[kPixels][kWords<kChannels>];
  if constexpr (kExperts) {
    read_experts<T, kChannels>(words, call, shared.choice, part, unit, row);
    store_ring(shared.kept, row - part.top, words, unit);
  } else {
    read_pixels(words, Features<kChannels>{call.x}, call.walk, part, unit, row);
  }
  normalise_all<T>(words, call.channels);
  store_ring(shared.normalised, row - part.top, words, unit);
  pointwise_gelu<T>(words, call.weights.g, call.weights.g_bias, unit);
  write_ring(shared.g, row - part.top, words, call.walk, part, unit, row);
}

// The result, of a step's rows from `row` of the band on.
template <class T, bool kExperts, int kChannels>
__device__ void finish(const Shared<kChannels>& shared, const Call& call, const Part& part, int row) {
  constexpr int kCount = kWords<kChannels>;
  const Unit unit(call.walk);
  row += part.top;
  if (row < part.top || row + unit.row >= part.bottom) return;
  uint32_t u[kPixels][kCount];
  read_ring(u, shared.normalised, row - part.top, 0, unit);
  pointwise_gelu<T>(u, call.weights.u, call.weights.u_bias, unit);
  uint32_t convolved[kPixels][kCount];
  depthwise_with_bias<3, 3>(convolved, shared.g, call.weights.gate, part, unit, row);
  multiply_all(u, convolved);
  float sums[kPixels][kCount][2];
  pointwise(sums, u, call.weights.project, call.weights.project_bias, unit);
  if constexpr (kExperts) {
    read_ring(u, shared.kept, row - part.top, 0, unit);
  } else {
    read_pixels(u, Features<kChannels>{call.x}, call.walk, part, unit, row);
  }
  add_to<T, true>(u, sums);
  write_own(Features<kChannels>{call.y}, u, call.walk, part, unit, row);
}

template <class T, int kChannels, bool kExperts>
__global__ void __launch_bounds__(threads_of(most_columns(kChannels)), blocks_of(kChannels))
    ffn_kernel(const __grid_constant__ Call call) {
  DYNAMIC_SHARED(char, memory);
  __shared__ Part part;
  part.find(call.walk);
  const int columns = call.walk.columns;
  const int64_t ring_bytes = Ring<kChannels, kRing>::bytes(columns);
  float* const floats = reinterpret_cast<float*>(memory + (2 + kExperts) * ring_bytes);
  const Shared<kChannels> shared{
      {memory, columns},
      {memory + ring_bytes, columns},
      {memory + 2 * ring_bytes, columns},
      {floats, floats + kMostRanks, reinterpret_cast<uint32_t*>(floats + kMostRanks + kChannels)}};
  if constexpr (kExperts) {
    shared.choice.template read<kChannels>(call.experts, part.image);
  }
  for (int row = -kStep; row < call.walk.rows; row += kStep) {
    compute_g<T, kExperts>(shared, call, part, row + 1);
    __syncthreads();
    finish<T, kExperts>(shared, call, part, row);
    __syncthreads();
  }
}

template <bool kExperts>
void launch(const Scene& scene, void* x, void* y, const FfnWeights& weights, const ExpertsCall& experts) {
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const int columns = columns_of(most_columns(kChannels), shared_bytes<kChannels, kExperts>);
    const Walk walk = plan_walk(scene.net.size, scene.rows, columns, kHalo, kHalo, 2);
    Call call{walk, scene.channels(), scene.features<kChannels>(x), scene.features<kChannels>(y), weights, experts};
    call.experts.a = scene.features<kChannels>(scene.buffers.a);
    LAUNCH_LARGE((ffn_kernel<decltype(type), kChannels, kExperts>), grid_of(walk.blocks(), "network"), walk.threads(),
                 (shared_bytes<kChannels, kExperts>(columns)), scene.stream, call);
  });
}

}  // namespace

void launch_experts(const Scene& scene, const GroupWeights& weights) {
  const Buffers& b = scene.buffers;
  const NetworkConfig& config = scene.config();
  const Size map = scene.map(config.recursive);
  ExpertsCall call{{},
                   scene.ranks(),
                   b.small,
                   b.expert_index,
                   b.expert_weight,
                   static_cast<int>(config.top_k),
                   scene.widths.rank_chunks,
                   {},
                   Axis<float>(scene.net.size.height, map.height),
                   Axis<float>(scene.net.size.width, map.width),
                   weights.experts_a,
                   weights.mix,
                   weights.mix_ranks,
                   weights.experts_a_bias,
                   weights.mix_bias,
                   weights.experts_bias};
  int rank = 0;
  for (int64_t e = 0; e < config.experts; ++e) {
    for (int64_t i = 0; i < config.ranks[e]; ++i) call.expert[rank++] = static_cast<int8_t>(e);
  }
  while (rank < kMostRanks) call.expert[rank++] = -1;
  launch<true>(scene, b.x[0], b.x[1], weights.local_ffn, call);
}

void launch_ffn(const Scene& scene, const GroupWeights& weights) {
  const ExpertsCall none{{}, {}, {}, {}, {}, 0, 0, {}, {1, 1}, {1, 1}, {}, {}, {}, {}, {}, {}};
  launch<false>(scene, scene.buffers.x[0], scene.buffers.x[1], weights.global_ffn, none);
}

}  // namespace seemore::gpu
