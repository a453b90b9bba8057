// The network's weights as the engine uses them: in one block of memory, folded and packed.
#pragma once

#include "cpu/network/conv3x3.h"
#include "params/network.h"

namespace seemore::SEEMORE_ISA {

inline bool is_bfloat16(const NetworkConfig& config) { return config.dtype == static_cast<int64_t>(DType::bfloat16); }

// Depthwise weights, [channel][tap], and biases.
struct Depthwise {
  Depthwise(Arena& arena, int64_t channels, int64_t count)
      : count(count), weights(arena.allocate<float>(channels * count)), bias(arena.allocate<float>(channels)) {}
  Taps<float> operator[](int64_t channel) const { return {weights + channel * count, count, bias[channel]}; }
  int64_t count;
  float *weights, *bias;
};

struct Affine {
  Affine(Arena& arena, int64_t channels)
      : weight(arena.allocate<float>(channels)), bias(arena.allocate<float>(channels)) {}
  float *weight, *bias;
};

// Rows of an expert in the packed projections: an even number, so that each begins with a cell.
inline int64_t padded_rank(int64_t rank) { return round_up(rank, 2); }

inline int64_t all_ranks(const NetworkConfig& config) {
  int64_t sum = 0;
  for (int64_t e = 0; e < config.experts; ++e) sum += padded_rank(config.ranks[e]);
  return sum;
}

template <class Cell>
struct FfnWeights {
  FfnWeights(Arena& arena, int64_t c)
      : expand(allocate_matrix<Cell>(arena, 2 * c, 1, c)),
        gate(arena, c, 9),
        project(allocate_matrix<Cell>(arena, c, 1, c)) {}
  Matrix<Cell> expand;  // with the norm's weight and bias
  Depthwise gate;
  Matrix<Cell> project;
};

// The weights of all experts; an image's own matrices are packed from them once its experts are chosen.
struct ExpertWeights {
  ExpertWeights(Arena& arena, const NetworkConfig& config)
      : ranks(all_ranks(config)),
        router(arena.allocate<float>(config.experts * config.channels)),
        weight_a(arena.allocate<float>(ranks * config.channels)),
        bias_a(arena.allocate<float>(ranks)),
        weight_s(arena.allocate<float>(ranks * config.channels)),
        bias_s(arena.allocate<float>(ranks)),
        weight_out(arena.allocate<float>(config.channels * ranks)),
        bias_out(arena.allocate<float>(config.experts * config.channels)),
        weight_proj(arena.allocate<float>(config.channels * config.channels)),
        bias_proj(arena.allocate<float>(config.channels)) {}
  int64_t ranks;
  float* router;                 // (E, C)
  float *weight_a, *bias_a;      // (R, C), R
  float *weight_s, *bias_s;      // of the small map: weight_k @ weight_pw
  float *weight_out, *bias_out;  // (C, R), (E, C): weight_proj @ weight_out, @ bias_out
  float *weight_proj, *bias_proj;
};

template <class Cell>
struct GroupWeights {
  GroupWeights(Arena& arena, const NetworkConfig& config)
      : norm_1(arena, config.channels),
        conv(allocate_conv3x3<Cell>(arena, config.channels, config.channels)),
        expand(allocate_matrix<Cell>(arena, 2 * config.channels + all_ranks(config), 1, config.channels)),
        aggregate(arena, config.channels, 16),
        calibrate(arena, config.channels, 9),
        row(arena, config.channels, 3),
        col(arena, config.channels, 3),
        experts(arena, config),
        local_ffn(arena, config.channels),
        to_qv(allocate_matrix<Cell>(arena, 2 * config.channels, 1, config.channels)),
        striped_row(arena, config.channels, config.taps),
        striped_col(arena, config.channels, config.taps),
        project(allocate_matrix<Cell>(arena, config.channels, 1, config.channels)),
        global_ffn(arena, config.channels) {}
  Affine norm_1;
  Matrix<Cell> conv, expand;  // expand: to a, k and weight_k @ k of all experts
  Depthwise aggregate, calibrate, row, col;
  ExpertWeights experts;
  FfnWeights<Cell> local_ffn;
  Matrix<Cell> to_qv;  // with the norm's weight and bias
  Depthwise striped_row, striped_col;
  Matrix<Cell> project;
  FfnWeights<Cell> global_ffn;
};

template <class Cell>
struct NetworkWeights {
  NetworkWeights(Arena& arena, const NetworkConfig& config)
      : conv_1(allocate_matrix<float>(arena, config.channels, 9, config.in_channels)),
        norm(arena, config.channels),
        conv_2(allocate_conv3x3<Cell>(arena, config.channels, config.channels)),
        upsampler(allocate_conv3x3<float>(arena, config.in_channels * config.scale * config.scale, config.channels)),
        groups(arena.bytes()) {}
  Matrix<float> conv_1;
  Affine norm;
  Matrix<Cell> conv_2;
  Matrix<float> upsampler;
  int64_t groups;  // where the first group's weights begin, in bytes
};

// A group's weights in the block that holds all.
template <class Cell>
GroupWeights<Cell> group_weights(const NetworkConfig& config, const void* weights, int64_t group) {
  Arena start(nullptr);
  const NetworkWeights<Cell> outer(start, config);
  const GroupWeights<Cell> counted(start, config);
  const int64_t bytes = start.bytes() - outer.groups;
  Arena arena(static_cast<char*>(const_cast<void*>(weights)) + outer.groups + group * bytes);
  return GroupWeights<Cell>(arena, config);
}

}  // namespace seemore::SEEMORE_ISA
