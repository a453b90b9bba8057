// Folding and packing of the network's weights, a launch a group. Products of weights are added up in float64.

#include "cuda/network/parameters.h"

namespace seemore::gpu {
namespace {

constexpr int kThreads = 256;
constexpr float kHalf = 0.5f;  // of weights before GELU; see gelu_of_doubles

// The sizes that kernels need, and the experts' ranks: (expert, rank within it) of each rank, which are padded at the
// end.
struct Sizes {
  Sizes(const NetworkConfig& config)
      : channels(static_cast<int>(config.channels)),
        in_channels(static_cast<int>(config.in_channels)),
        experts(static_cast<int>(config.experts)),
        taps(static_cast<int>(config.taps)),
        is_shuffled(config.is_shuffled) {
    for (int64_t e = 0; e < config.experts; ++e) {
      rank_of[e] = static_cast<int>(config.ranks[e]);
      for (int64_t r = 0; r < config.ranks[e]; ++r, ++ranks) {
        expert[ranks] = static_cast<int8_t>(e), within[ranks] = static_cast<int8_t>(r);
      }
    }
  }
  int channels, in_channels, experts, taps, ranks = 0;
  bool is_shuffled;
  int rank_of[kMostExperts];
  int8_t expert[kMostRanks], within[kMostRanks];
};

// sum over i of left[i] * right[i * stride]
__device__ float dot(const float* left, const float* right, int count, int stride = 1) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<double>(left[i]) * right[int64_t(i) * stride];
  return static_cast<float>(sum);
}

// The places of numbers within a product: an eighth (outputs) or a word (inputs) of a lane of a quad.
struct OfChannels {
  int padded;
  __device__ int operator()(int word, int lane) const { return channel_of(padded, word, lane); }
};
struct OfRanks {  // of a chunk
  __device__ int operator()(int word, int lane) const { return 4 * lane + 2 * word; }
};
struct InOrder {
  __device__ int operator()(int word, int lane) const { return 8 * word + 2 * lane; }
};

// Writes value(output, input) for `outputs` eights and `inputs` words, as `multiply` reads it.
template <class T, class Outputs, class Inputs, class Value>
__device__ void pack(uint4* to, int outputs, int inputs, Outputs output_of, Inputs input_of, Value value) {
  T* const elements = reinterpret_cast<T*>(to);
  const int count = quads_of(outputs, inputs) * kWarp * 8, paired = inputs / 2 * outputs * 2;
  for (int e = threadIdx.x; e < count; e += kThreads) {
    const int lane = e / 8 % kWarp, word = e / 8 / kWarp * 4 + e / 2 % 4;
    const int output = word < paired ? word / 2 % outputs : word - paired;
    const int input = word < paired ? word / 2 / outputs * 2 + word % 2 : inputs - 1;
    float number = 0;
    if (word < outputs * inputs) {
      const int column = lane / 4;  // of the eight
      number = value(output_of(output, column / 2) + column % 2, input_of(input, lane % 4) + e % 2);
    }
    elements[e] = to_storage<T>(number);
  }
}

// Writes value(row, column) for `columns` (padded) numbers in each of `rows`.
template <class Value>
__device__ void fill_rows(float* to, int rows, int columns, Value value) {
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) to[i] = value(i / columns, i % columns);
}

template <int kChannels>
class Packer {
 public:
  __device__ explicit Packer(const Sizes& sizes) : s_(sizes), c_(sizes.channels) {}

  __device__ void conv(const ConvWeights& to, const Layer& norm, const Layer& from, float scale) const {
    vector(to.norm_weight, norm.weight);
    vector(to.norm_bias, norm.bias);
    for (int tap = 0; tap < 9; ++tap) {
      square(
          to.taps + tap * quads_of(kWords, kWords) * kWarp,
          [&](int o, int i) { return scale * from.weight[(o * c_ + i) * 9 + tap]; }, InOrder());
    }
    vector(to.bias, from.bias, scale);
  }

  // Part 0 or 1 of a pointwise convolution, with the norm before it and GELU after it.
  __device__ void norm_pointwise(uint4* to, float* bias, const Layer& norm, const Layer& from, int part) const {
    const float* const weight = from.weight + part * c_ * c_;
    square(to, [&](int o, int i) { return kHalf * weight[o * c_ + i] * norm.weight[i]; });
    channels(bias, 1,
             [&](int, int o) { return kHalf * (from.bias[part * c_ + o] + dot(weight + o * c_, norm.bias, c_)); });
  }

  __device__ void pointwise(uint4* to, float* bias, const Layer& from, float scale = 1) const {
    square(to, [&](int o, int i) { return scale * from.weight[o * c_ + i]; });
    vector(bias, from.bias, scale);
  }

  __device__ void ffn(const FfnWeights& to, const FfnLayers& from) const {
    norm_pointwise(to.u, to.u_bias, from.norm, from.expand, 0);
    norm_pointwise(to.g, to.g_bias, from.norm, from.expand, 1);
    pointwise(to.project, to.project_bias, from.project, kHalf);
    depthwise(to.gate, from.gate, 9, 9);
  }

  // Taps, as many as `padded`, and the bias.
  __device__ void depthwise(uint32_t* to, const Layer& from, int taps, int padded) const {
    const int before = (padded - taps) / 2;
    features(to, padded + 1, [&](int tap, int c) {
      if (tap == padded) return from.bias[c];
      const int at = tap - before;
      return at >= 0 && at < taps ? from.weight[c * taps + at] : 0;
    });
  }

  // a, k and the ranks of k: (weight_k @ expand_k) g + weight_k @ bias_expand_k + bias_k.
  __device__ void expand(const GroupWeights& to, const GroupLayers& from, int rank_chunks) const {
    const Layer& expand = from.expand;
    const auto row = [&](int i) { return s_.is_shuffled ? i % 2 * c_ + i / 2 : i; };
    uint4* const matrices[2] = {to.a, to.k};
    float* const biases[2] = {to.a_bias, to.k_bias};
    for (int part = 0; part < 2; ++part) {
      square(matrices[part], [&](int o, int i) { return expand.weight[row(part * c_ + o) * c_ + i]; });
      channels(biases[part], 1, [&](int, int o) { return expand.bias[row(part * c_ + o)]; });
    }
    const auto of_rank = [&](int rank) { return from.experts.k[s_.expert[rank]].weight + s_.within[rank] * c_; };
    for (int chunk = 0; chunk < rank_chunks; ++chunk) {
      pack<Operand>(to.ranks + chunk * quads_of(2, kWords) * kWarp, 2, kWords, OfRanks(), OfChannels{kChannels},
                    [&](int o, int i) {
                      const int rank = chunk * kChunk + o;
                      if (rank >= s_.ranks || i >= c_) return 0.f;
                      double sum = 0;
                      for (int k = 0; k < c_; ++k) {
                        sum += static_cast<double>(of_rank(rank)[k]) * expand.weight[row(c_ + k) * c_ + i];
                      }
                      return static_cast<float>(sum);
                    });
    }
    fill_rows(to.ranks_bias, 1, rank_chunks * kChunk, [&](int, int rank) {
      if (rank >= s_.ranks) return 0.f;
      double sum = from.experts.k[s_.expert[rank]].bias[s_.within[rank]];
      for (int k = 0; k < c_; ++k) sum += static_cast<double>(of_rank(rank)[k]) * expand.bias[row(c_ + k)];
      return static_cast<float>(sum);
    });
  }

  __device__ void stripes(const GroupWeights& to, const Layer& row, const Layer& column) const {
    features(to.stripes, kStripes, [&](int tap, int c) {
      const float* const weight = column.weight + 3 * c;
      if (tap < 9) return kHalf * weight[tap / 3] * row.weight[3 * c + tap % 3];
      const int present = tap - 9;  // 1: a row above, 2: one below
      const float sum = weight[1] + (present & 1 ? weight[0] : 0) + (present & 2 ? weight[2] : 0);
      return kHalf * (column.bias[c] + row.bias[c] * sum);
    });
  }

  // For the small map: weight_k @ weight_pw.
  __device__ void small_map(const GroupWeights& to, const GroupLayers& from, int rank_chunks) const {
    channels(to.aggregate, 16, [&](int tap, int c) { return from.aggregate.weight[c * 16 + tap]; });
    vector(to.aggregate_bias, from.aggregate.bias);
    channels(to.calibrate, 9, [&](int tap, int c) { return from.calibrate.weight[c * 9 + tap]; });
    vector(to.calibrate_bias, from.calibrate.bias);
    const auto of_rank = [&](int rank) { return from.experts.k[s_.expert[rank]].weight + s_.within[rank] * c_; };
    fill_rows(to.small, rank_chunks * kChunk, kChannels, [&](int rank, int c) {
      return rank < s_.ranks && c < c_ ? dot(of_rank(rank), from.pointwise.weight + c, c_, c_) : 0;
    });
    fill_rows(to.small_bias, 1, rank_chunks * kChunk,
              [&](int, int rank) { return rank < s_.ranks ? dot(of_rank(rank), from.pointwise.bias, c_) : 0; });
  }

  __device__ void experts(const GroupWeights& to, const GroupLayers& from, int rank_chunks) const {
    pointwise(to.mix, to.mix_bias, from.proj);
    for (int i = threadIdx.x; i < s_.experts * c_; i += kThreads) to.router[i] = from.router[i];
    const auto layer = [&](const Layer(&layers)[kMostExperts], int rank) { return layers[s_.expert[rank]]; };
    for (int chunk = 0; chunk < rank_chunks; ++chunk) {
      pack<Operand>(to.experts_a + chunk * quads_of(2, kWords) * kWarp, 2, kWords, OfRanks(), OfChannels{kChannels},
                    [&](int o, int i) {
                      const int rank = chunk * kChunk + o;
                      if (rank >= s_.ranks || i >= c_) return 0.f;
                      return layer(from.experts.a, rank).weight[s_.within[rank] * c_ + i];
                    });
      pack<Operand>(to.mix_ranks + chunk * quads_of(kWords, 2) * kWarp, kWords, 2, OfChannels{kChannels}, OfRanks(),
                    [&](int o, int i) {
                      const int rank = chunk * kChunk + i;
                      if (rank >= s_.ranks || o >= c_) return 0.f;
                      const float* const out = layer(from.experts.out, rank).weight + s_.within[rank];
                      return dot(from.proj.weight + o * c_, out, c_, s_.rank_of[s_.expert[rank]]);
                    });
    }
    fill_rows(to.experts_a_bias, 1, rank_chunks * kChunk,
              [&](int, int rank) { return rank < s_.ranks ? layer(from.experts.a, rank).bias[s_.within[rank]] : 0; });
    channels(to.experts_bias, s_.experts,
             [&](int e, int o) { return dot(from.proj.weight + o * c_, from.experts.out[e].bias, c_); });
  }

  __device__ void upsampler(const EndWeights& to, const Layer& from, const Widths& widths) const {
    constexpr int kQuads = quads_of(kOutputTiles, kWords) * kWarp;
    for (int chunk = 0; chunk < widths.output_chunks; ++chunk) {
      for (int tap = 0; tap < 9; ++tap) {
        const int at = (chunk * 9 + tap) * kQuads;
        accurately(to.upsampler[0] + at, to.upsampler[1] + at, kOutputTiles, kWords, InOrder(), [&](int o, int i) {
          const int output = chunk * 8 * kOutputTiles + o;
          return output < widths.outputs && i < c_ ? from.weight[(output * c_ + i) * 9 + tap] : 0.f;
        });
      }
    }
    fill_rows(to.upsampler_bias, 1, widths.outputs, [&](int, int o) { return from.bias[o]; });
  }

  // A lane of a quad has a channel, whose words are the first two columns of a row, and the third one.
  __device__ void first(const EndWeights& to, const Layer& from, const Widths& widths) const {
    for (int row = 0; row < 3 * widths.picture_chunks; ++row) {
      const int at = row * quads_of(kWords, 2) * kWarp;
      accurately(to.first[0] + at, to.first[1] + at, kWords, 2, OfChannels{kChannels}, [&](int o, int i) {
        const int channel = row / 3 * kPictureChannels + i % 8 / 2, right = i / 8 * 2 + i % 2;
        if (o >= c_ || channel >= s_.in_channels || right > 2) return 0.f;
        return from.weight[((o * s_.in_channels + channel) * 3 + row % 3) * 3 + right];
      });
    }
    vector(to.first_bias, from.bias);
  }

  // The bias of both convolutions whose results are added.
  __device__ void bias(float* to, const Layer& one, const Layer& other) const {
    channels(to, 1, [&](int, int c) { return one.bias[c] + other.bias[c]; });
  }

 private:
  static constexpr int kWords = kChannels / 8;

  template <class Value>
  __device__ void square(uint4* to, Value value) const {
    square(to, value, OfChannels{kChannels});
  }
  template <class Value, class Inputs>
  __device__ void square(uint4* to, Value value, Inputs input_of) const {
    pack<Operand>(to, kWords, kWords, OfChannels{kChannels}, input_of,
                  [&](int o, int i) { return o < c_ && i < c_ ? value(o, i) : 0.f; });
  }
  // The bfloat16 of each weight, and that of what it leaves.
  template <class Outputs, class Value>
  __device__ void accurately(uint4* upper, uint4* lower, int outputs, int inputs, Outputs output_of,
                             Value value) const {
    const auto upper_of = [&](int o, int i) { return to_accum(to_storage<__nv_bfloat16>(value(o, i))); };
    pack<__nv_bfloat16>(upper, outputs, inputs, output_of, InOrder(), upper_of);
    pack<__nv_bfloat16>(lower, outputs, inputs, output_of, InOrder(),
                        [&](int o, int i) { return value(o, i) - upper_of(o, i); });
  }
  template <class Value>
  __device__ void channels(float* to, int rows, Value value) const {
    fill_rows(to, rows, kChannels, [&](int row, int c) { return c < c_ ? value(row, c) : 0.f; });
  }
  template <class Value>
  __device__ void features(uint32_t* to, int taps, Value value) const {
    constexpr int kTail = kChannels - kHead;
    Operand* const elements = reinterpret_cast<Operand*>(to);
    for (int i = threadIdx.x; i < taps * kChannels; i += kThreads) {
      const int tap = i / kChannels, c = i % kChannels;
      const int at = c < kHead ? tap * kHead + c : (taps * kHead) + tap * kTail + c - kHead;
      elements[at] = to_storage<Operand>(c < c_ ? value(tap, c) : 0.f);
    }
  }
  __device__ void vector(float* to, const float* from, float scale = 1) const {
    channels(to, 1, [&](int, int c) { return scale * from[c]; });
  }

  const Sizes& s_;
  int c_;
};

struct EndsCall {
  Sizes sizes;
  Widths widths;
  Layer first, norm, conv_2, upsampler;
  EndWeights to;
};

template <int kChannels>
__global__ void __launch_bounds__(kThreads) pack_ends_kernel(const __grid_constant__ EndsCall call) {
  const Packer<kChannels> pack(call.sizes);
  switch (blockIdx.x) {
    case 0:
      return pack.first(call.to, call.first, call.widths);
    case 1:
      pack.conv(call.to.conv, call.norm, call.conv_2, 1);
      __syncthreads();
      return pack.bias(call.to.conv.bias, call.first, call.conv_2);
    default:
      return pack.upsampler(call.to, call.upsampler, call.widths);
  }
}

struct GroupCall {
  Sizes sizes;
  int rank_chunks;
  GroupLayers from;
  GroupWeights to;
};

constexpr int kEndsJobs = 3, kGroupJobs = 8;

template <int kChannels>
__global__ void __launch_bounds__(kThreads) pack_group_kernel(const __grid_constant__ GroupCall call) {
  const Packer<kChannels> pack(call.sizes);
  const GroupLayers& from = call.from;
  const GroupWeights& to = call.to;
  switch (blockIdx.x) {
    case 0:
      return pack.conv(to.conv, from.norm_1, from.conv, kHalf);
    case 1:
      return pack.expand(to, from, call.rank_chunks);
    case 2:
      pack.stripes(to, from.row, from.column);
      return pack.small_map(to, from, call.rank_chunks);
    case 3:
      return pack.experts(to, from, call.rank_chunks);
    case 4:
      return pack.ffn(to.local_ffn, from.local_ffn);
    case 5:
      pack.norm_pointwise(to.q, to.q_bias, from.norm_2, from.to_qv, 0);
      return pack.norm_pointwise(to.v, to.v_bias, from.norm_2, from.to_qv, 1);
    case 6:
      pack.pointwise(to.project, to.project_bias, from.project);
      pack.depthwise(to.row, from.striped_row, call.sizes.taps, kTaps);
      return pack.depthwise(to.column, from.striped_column, call.sizes.taps, kTaps);
    default:
      return pack.ffn(to.global_ffn, from.global_ffn);
  }
}

}  // namespace
}  // namespace seemore::gpu

namespace seemore {

NetworkSizes network_sizes(const NetworkConfig& config) {
  const auto dtype = static_cast<DType>(config.dtype);
  if (dtype != DType::float16 && dtype != DType::bfloat16) {
    throw std::runtime_error("network: dtype is neither float16 nor bfloat16, for which there are kernels");
  }
  return {gpu::NetworkLayers(config, nullptr).count, gpu::NetworkWeights(config, nullptr).bytes()};
}

void network_pack(const NetworkConfig& config, const float* parameters, void* weights, void* stream) {
  const gpu::NetworkLayers layers(config, parameters);
  const gpu::NetworkWeights packed(config, weights);
  const gpu::Sizes sizes(config);
  const gpu::Widths widths(config);
  gpu::with_features(DType::bfloat16, config.channels, [&](auto, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const gpu::EndsCall ends{sizes, widths, layers.first, layers.norm, layers.conv_2, layers.upsampler, packed.ends()};
    LAUNCH((gpu::pack_ends_kernel<kChannels>), gpu::kEndsJobs, gpu::kThreads, 0, stream, ends);
    for (int64_t number = 0; number < config.groups; ++number) {
      const gpu::GroupCall group{sizes, widths.rank_chunks, layers.groups[number], packed.group(number)};
      LAUNCH((gpu::pack_group_kernel<kChannels>), gpu::kGroupJobs, gpu::kThreads, 0, stream, group);
    }
  });
}

}  // namespace seemore
