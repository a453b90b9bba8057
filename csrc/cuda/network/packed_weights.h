// The network's weights on the GPU: matrices in the order in which `multiply` reads them, taps of stencils in float16,
// all else in float32.
#pragma once

#include "cuda/network/lanes.h"
#include "params/network.h"

namespace seemore::gpu {

constexpr int kChunk = 16;        // ranks of experts that are computed at once
constexpr int kMostExperts = 16;  // and kMostRanks, of all: else the operators serve
constexpr int kMostRanks = 64;
constexpr int kTaps = 11;            // of the striped convolution: fewer are padded with zeros
constexpr int kStripes = 9 + 4;      // taps of both stripes of three, and their biases
constexpr int kOutputTiles = 3;      // eights of the upsampler's outputs that are computed at once
constexpr int kPictureChannels = 4;  // that conv_1 takes at once
constexpr int kMostLevels = 3;       // aggregations

// Hands out parts of a block of memory, or counts them where it is null. Parts begin at multiples of 256 bytes.
class Parts {
 public:
  explicit Parts(const void* memory) : begin_(static_cast<char*>(const_cast<void*>(memory))) {}
  template <class Element>
  Element* next(int64_t count) {
    char* const part = begin_ ? begin_ + bytes_ : nullptr;
    bytes_ += ceil_div(count * int64_t(sizeof(Element)), 256) * 256;
    return reinterpret_cast<Element*>(part);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

// Sizes of a configuration.
struct Widths {
  explicit Widths(const NetworkConfig& config)
      : channels(config.channels <= 40   ? 40
                 : config.channels <= 48 ? 48
                                         : 64),
        words(channels / 8),
        outputs(static_cast<int>(config.in_channels * config.scale * config.scale)),
        output_chunks(static_cast<int>(ceil_div(outputs, 8 * kOutputTiles))),
        picture_chunks(static_cast<int>(ceil_div(config.in_channels, kPictureChannels))) {
    int64_t sum = 0;
    for (int64_t e = 0; e < config.experts; ++e) sum += config.ranks[e];
    rank_chunks = static_cast<int>(ceil_div(sum, kChunk));
  }
  int ranks() const { return rank_chunks * kChunk; }
  // Words of so many taps of a stencil, which lie as the pixels of `Features` do, in float16.
  int64_t taps(int count) const { return int64_t(count) * channels / 2; }

  int channels, words;  // padded, and as words of a lane
  int rank_chunks;
  int outputs, output_chunks, picture_chunks;
};

struct FfnWeights {
  FfnWeights(Parts& parts, const Widths& w) {
    const int64_t quads = quads_of(w.words, w.words) * kWarp;
    u = parts.next<uint4>(quads), g = parts.next<uint4>(quads), project = parts.next<uint4>(quads);
    u_bias = parts.next<float>(w.channels), g_bias = parts.next<float>(w.channels);
    gate = parts.next<uint32_t>(w.taps(9 + 1));
    project_bias = parts.next<float>(w.channels);
  }
  uint4 *u, *g, *project;  // half of them; u, g: with the norm's weight and bias
  float *u_bias, *g_bias, *project_bias;
  uint32_t* gate;  // 9 taps, bias
};

// A dense 3x3 convolution and the LayerNorm before it.
struct ConvWeights {
  ConvWeights(Parts& parts, const Widths& w) {
    norm_weight = parts.next<float>(w.channels), norm_bias = parts.next<float>(w.channels);
    taps = parts.next<uint4>(9 * quads_of(w.words, w.words) * kWarp);
    bias = parts.next<float>(w.channels);
  }
  float *norm_weight, *norm_bias;
  uint4* taps;  // [tap], a matrix each; before GELU half of it, and of the bias
  float* bias;
};

struct GroupWeights {
  GroupWeights(Parts& parts, const NetworkConfig& config) : GroupWeights(parts, config, Widths(config)) {}

  ConvWeights conv;
  uint4 *a, *k;  // of the pointwise convolution after it
  float *a_bias, *k_bias;
  uint4* ranks;       // [chunk]: weight_k @ k, of all experts' ranks
  float* ranks_bias;  // [rank]
  uint32_t* stripes;  // both stripes of a in one, half of it: 3 x 3 taps; the bias where there is no row above and
                      // below; one above; one below; both
  float *aggregate, *aggregate_bias;  // [16][channel]
  float *calibrate, *calibrate_bias;  // [9][channel]
  float *small, *small_bias;          // [rank][channel]: weight_k @ weight_pw, for the small map
  float* router;                      // (experts, channels) as they are
  uint4* experts_a;                   // [chunk]: weight_a
  float* experts_a_bias;              // [rank]
  uint4 *mix, *mix_ranks;             // weight_proj; [chunk]: weight_proj @ weight_out
  float *mix_bias, *experts_bias;     // [channel]: bias_proj; [expert][channel]: weight_proj @ bias_out
  FfnWeights local_ffn;
  uint4 *q, *v, *project;  // q, v: half of them, with the norm's weight and bias
  float *q_bias, *v_bias, *project_bias;
  uint32_t *row, *column;  // kTaps taps, bias
  FfnWeights global_ffn;

 private:
  GroupWeights(Parts& parts, const NetworkConfig& config, const Widths& w)
      : conv(parts, w), local_ffn(parts, w), global_ffn(parts, w) {
    const int64_t square = quads_of(w.words, w.words) * kWarp;
    const int64_t thin = int64_t(w.rank_chunks) * kWarp;
    a = parts.next<uint4>(square), k = parts.next<uint4>(square);
    a_bias = parts.next<float>(w.channels), k_bias = parts.next<float>(w.channels);
    ranks = parts.next<uint4>(thin * quads_of(2, w.words)), ranks_bias = parts.next<float>(w.ranks());
    stripes = parts.next<uint32_t>(w.taps(kStripes));
    aggregate = parts.next<float>(16 * w.channels), aggregate_bias = parts.next<float>(w.channels);
    calibrate = parts.next<float>(9 * w.channels), calibrate_bias = parts.next<float>(w.channels);
    small = parts.next<float>(w.ranks() * w.channels), small_bias = parts.next<float>(w.ranks());
    router = parts.next<float>(config.experts * config.channels);
    experts_a = parts.next<uint4>(thin * quads_of(2, w.words)), experts_a_bias = parts.next<float>(w.ranks());
    mix = parts.next<uint4>(square), mix_ranks = parts.next<uint4>(thin * quads_of(w.words, 2));
    mix_bias = parts.next<float>(w.channels), experts_bias = parts.next<float>(config.experts * w.channels);
    q = parts.next<uint4>(square), v = parts.next<uint4>(square), project = parts.next<uint4>(square);
    q_bias = parts.next<float>(w.channels), v_bias = parts.next<float>(w.channels);
    project_bias = parts.next<float>(w.channels);
    row = parts.next<uint32_t>(w.taps(kTaps + 1)), column = parts.next<uint32_t>(w.taps(kTaps + 1));
  }
};

// What stands before the groups and after them.
struct EndWeights {
  EndWeights(Parts& parts, const NetworkConfig& config) : EndWeights(parts, config, Widths(config)) {}

  // Matrices in float32's place have two parts: the bfloat16 of their numbers, and that of what it leaves.
  uint4* first[2];  // [chunk of kPictureChannels][row of the window]: conv_1
  float* first_bias;
  ConvWeights conv;       // norm and conv_2, whose bias has that of conv_1 in it
  uint4* upsampler[2];    // [chunk of outputs][tap]
  float* upsampler_bias;  // [output]

 private:
  EndWeights(Parts& parts, const NetworkConfig& config, const Widths& w) : conv(parts, w) {
    const int64_t quads = int64_t(w.picture_chunks) * 3 * quads_of(w.words, 2) * kWarp;
    for (uint4*& part : first) part = parts.next<uint4>(quads);
    first_bias = parts.next<float>(w.channels);
    const int64_t up_quads = int64_t(w.output_chunks) * 9 * quads_of(kOutputTiles, w.words) * kWarp;
    for (uint4*& part : upsampler) part = parts.next<uint4>(up_quads);
    upsampler_bias = parts.next<float>(w.outputs);
  }
};

// All of them, in one block of memory.
class NetworkWeights {
 public:
  NetworkWeights(const NetworkConfig& config, const void* memory) : config_(config), memory_(memory) {
    Parts parts(nullptr);
    const EndWeights ends(parts, config);
    ends_ = parts.bytes();
    const GroupWeights group(parts, config);
    group_ = parts.bytes() - ends_;
  }
  EndWeights ends() const {
    Parts parts(memory_);
    return EndWeights(parts, config_);
  }
  GroupWeights group(int64_t number) const {
    Parts parts(static_cast<const char*>(memory_) + ends_ + number * group_);
    return GroupWeights(parts, config_);
  }
  int64_t bytes() const { return ends_ + config_.groups * group_; }
  int64_t group_bytes() const { return group_; }

 private:
  const NetworkConfig& config_;
  const void* memory_;
  int64_t ends_, group_;
};

}  // namespace seemore::gpu
