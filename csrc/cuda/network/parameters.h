// The model's parameters, layer by layer, in the order of its state dict.
#pragma once

#include <vector>

#include "cuda/network/packed_weights.h"

namespace seemore::gpu {

struct Layer {
  const float *weight, *bias;
};

// The model's parameters, one after another in the order of its state dict.
class ParameterReader {
 public:
  explicit ParameterReader(const float* begin) : begin_(begin) {}
  Layer layer(int64_t rows, int64_t inputs) {
    const float* const weight = vector(rows * inputs);
    return {weight, vector(rows)};
  }
  const float* vector(int64_t count) {
    const float* const part = begin_ + count_;
    count_ += count;
    return part;
  }
  int64_t count() const { return count_; }

 private:
  const float* begin_;
  int64_t count_ = 0;
};

struct FfnLayers {
  FfnLayers(ParameterReader& read, int64_t c)
      : norm(read.layer(c, 1)), expand(read.layer(2 * c, c)), project(read.layer(c, c)), gate(read.layer(c, 9)) {}
  Layer norm, expand, project, gate;
};

struct GroupLayers {
  GroupLayers(ParameterReader& read, const NetworkConfig& config, int64_t c)
      : norm_1(read.layer(c, 1)),
        conv(read.layer(c, 9 * c)),
        expand(read.layer(2 * c, c)),
        aggregate(read.layer(c, 16)),
        calibrate(read.layer(c, 9)),
        pointwise(read.layer(c, c)),
        row(read.layer(c, 3)),
        column(read.layer(c, 3)),
        experts(read_experts(read, config, c)),
        router(read.vector(config.experts * c)),
        proj(read.layer(c, c)),
        local_ffn(read, c),
        norm_2(read.layer(c, 1)),
        project(read.layer(c, c)),
        to_qv(read.layer(2 * c, c)),
        striped_row(read.layer(c, config.taps)),
        striped_column(read.layer(c, config.taps)),
        global_ffn(read, c) {}

  struct Experts {
    Layer a[kMostExperts], k[kMostExperts], out[kMostExperts];
  };

  Layer norm_1, conv, expand, aggregate, calibrate, pointwise, row, column;
  Experts experts;
  const float* router;
  Layer proj;
  FfnLayers local_ffn;
  Layer norm_2, project, to_qv, striped_row, striped_column;
  FfnLayers global_ffn;

 private:
  static Experts read_experts(ParameterReader& read, const NetworkConfig& config, int64_t c) {
    Experts experts;
    for (int64_t e = 0; e < config.experts; ++e) {
      const int64_t rank = config.ranks[e];
      experts.a[e] = read.layer(rank, c), experts.k[e] = read.layer(rank, c), experts.out[e] = read.layer(c, rank);
    }
    return experts;
  }
};

struct NetworkLayers {
  NetworkLayers(const NetworkConfig& config, const float* begin) {
    const int64_t c = config.channels;
    ParameterReader read(begin);
    first = read.layer(c, 9 * config.in_channels);
    for (int64_t group = 0; group < config.groups; ++group) groups.emplace_back(read, config, c);
    norm = read.layer(c, 1), conv_2 = read.layer(c, 9 * c);
    upsampler = read.layer(config.in_channels * config.scale * config.scale, 9 * c);
    count = read.count();
  }

  Layer first;
  std::vector<GroupLayers> groups;
  Layer norm, conv_2, upsampler;
  int64_t count;
};

}  // namespace seemore::gpu
