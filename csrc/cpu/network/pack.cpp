// Folding and packing of the network's weights. Products of weights are added up in float64.

#include "cpu/network/weights.h"

namespace seemore::SEEMORE_ISA {
namespace {

// The model's parameters, one after another in the order of its state dict.
class ParameterReader {
 public:
  explicit ParameterReader(const float* next) : next_(next) {}
  const float* read(int64_t count) {
    const float* values = next_;
    next_ += count;
    return values;
  }
  const float* next() const { return next_; }

 private:
  const float* next_;
};

struct Layer {
  Layer(ParameterReader& parameters, int64_t rows, int64_t inputs)
      : weight(parameters.read(rows * inputs)), bias(parameters.read(rows)), inputs(inputs) {}
  float operator()(int64_t row, int64_t input) const { return weight[row * inputs + input]; }
  const float *weight, *bias;
  int64_t inputs;
};

// (left @ right)[row, column] of (?, n) and (n, columns)
double product(const float* left, const float* right, int64_t n, int64_t columns, int64_t row, int64_t column) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(left[row * n + i]) * right[i * columns + column];
  return sum;
}

template <class Cell>
void copy_bias(const Matrix<Cell>& to, const Layer& from, int64_t rows) {
  for (int64_t r = 0; r < to.rows; ++r) to.bias[r] = r < rows ? from.bias[r] : 0;
}

template <class Cell>
void pack_conv3x3(const Matrix<Cell>& to, const Layer& from, int64_t rows, int64_t channels) {
  pack_conv3x3(to, rows, channels, [&](int64_t r, int64_t c, int64_t tap) { return from(r, c * 9 + tap); });
  copy_bias(to, from, rows);
}

template <class Cell>
void pack_pointwise(const Matrix<Cell>& to, const Layer& from, int64_t rows, int64_t channels) {
  pack(to, rows, channels, channels, [&](int64_t r, int64_t, int64_t c) { return from(r, c); });
  copy_bias(to, from, rows);
}

// W (norm.weight * x + norm.bias) + b
template <class Cell>
void pack_norm_pointwise(const Matrix<Cell>& to, const Layer& norm, const Layer& from, int64_t rows, int64_t channels) {
  pack(to, rows, channels, channels, [&](int64_t r, int64_t, int64_t c) { return from(r, c) * norm.weight[c]; });
  for (int64_t r = 0; r < to.rows; ++r) {
    to.bias[r] = r < rows ? from.bias[r] + product(from.weight, norm.bias, channels, 1, r, 0) : 0;
  }
}

void copy(float* to, const float* from, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

void copy(const Depthwise& to, const Layer& from, int64_t channels) {
  copy(to.weights, from.weight, channels * to.count);
  copy(to.bias, from.bias, channels);
}

void copy(const Affine& to, const Layer& from, int64_t channels) {
  copy(to.weight, from.weight, channels);
  copy(to.bias, from.bias, channels);
}

template <class Cell>
void pack_ffn(const FfnWeights<Cell>& to, ParameterReader& parameters, int64_t c) {
  const Layer norm(parameters, c, 1), expand(parameters, 2 * c, c), project(parameters, c, c);
  const Layer gate(parameters, c, 9);
  pack_norm_pointwise(to.expand, norm, expand, 2 * c, c);
  pack_pointwise(to.project, project, c, c);
  copy(to.gate, gate, c);
}

template <class Cell>
void pack_group(const NetworkConfig& config, const GroupWeights<Cell>& to, ParameterReader& parameters) {
  const int64_t c = config.channels;
  // Local block.
  copy(to.norm_1, Layer(parameters, c, 1), c);
  pack_conv3x3(to.conv, Layer(parameters, c, c * 9), c, c);
  const Layer expand(parameters, 2 * c, c);
  copy(to.aggregate, Layer(parameters, c, 16), c);
  copy(to.calibrate, Layer(parameters, c, 9), c);
  const Layer pointwise(parameters, c, c);
  copy(to.row, Layer(parameters, c, 3), c);
  copy(to.col, Layer(parameters, c, 3), c);
  const ParameterReader first_expert = parameters;
  for (int64_t e = 0; e < config.experts; ++e) {
    const int64_t rank = config.ranks[e];
    parameters.read(2 * (rank * c + rank) + c * rank + c);
  }
  const float* router = parameters.read(config.experts * c);
  const Layer proj(parameters, c, c);

  const ExpertWeights& experts = to.experts;
  copy(experts.router, router, config.experts * c);
  copy(experts.weight_proj, proj.weight, c * c);
  copy(experts.bias_proj, proj.bias, c);
  ParameterReader next = first_expert;
  const auto expand_row = [&](int64_t row) { return config.is_shuffled ? row % 2 * c + row / 2 : row; };
  Buffer<float> weight_k(experts.ranks * c), bias_k(experts.ranks), expand_k(c * c), bias_expand_k(c);
  for (int64_t i = 0; i < c; ++i) {
    copy(expand_k + i * c, expand.weight + expand_row(c + i) * c, c);
    bias_expand_k[i] = expand.bias[expand_row(c + i)];
  }
  for (int64_t e = 0, at = 0; e < config.experts; ++e) {
    const int64_t rank = config.ranks[e];
    const Layer a(next, rank, c), k(next, rank, c), out(next, c, rank);
    for (int64_t r = 0; r < padded_rank(rank); ++r, ++at) {
      const bool is_there = r < rank;
      for (int64_t i = 0; i < c; ++i) {
        experts.weight_a[at * c + i] = is_there ? a(r, i) : 0;
        weight_k[at * c + i] = is_there ? k(r, i) : 0;
        experts.weight_s[at * c + i] = is_there ? product(k.weight, pointwise.weight, c, c, r, i) : 0;
        experts.weight_out[i * experts.ranks + at] = is_there ? product(proj.weight, out.weight, c, rank, i, r) : 0;
      }
      experts.bias_a[at] = is_there ? a.bias[r] : 0;
      bias_k[at] = is_there ? k.bias[r] : 0;
      experts.bias_s[at] = is_there ? product(k.weight, pointwise.bias, c, 1, r, 0) : 0;
    }
    for (int64_t i = 0; i < c; ++i) experts.bias_out[e * c + i] = product(proj.weight, out.bias, c, 1, i, 0);
  }
  // Rows: a, k and weight_k @ k, whose bias is in it: (weight_k @ expand_k) g + weight_k @ bias_expand_k + bias_k.
  Buffer<float> folded(experts.ranks * c);
  for (int64_t r = 0; r < experts.ranks * c; ++r) folded[r] = product(weight_k, expand_k, c, c, r / c, r % c);
  pack(to.expand, 2 * c + experts.ranks, c, c, [&](int64_t r, int64_t, int64_t i) {
    return r < 2 * c ? expand(expand_row(r), i) : folded[(r - 2 * c) * c + i];
  });
  for (int64_t r = 0; r < to.expand.rows; ++r) {
    const int64_t k = r - 2 * c;
    to.expand.bias[r] = k < 0               ? expand.bias[expand_row(r)]
                        : k < experts.ranks ? bias_k[k] + product(weight_k, bias_expand_k, c, 1, k, 0)
                                            : 0;
  }
  pack_ffn(to.local_ffn, parameters, c);

  // Global block.
  const Layer norm(parameters, c, 1);
  pack_pointwise(to.project, Layer(parameters, c, c), c, c);
  pack_norm_pointwise(to.to_qv, norm, Layer(parameters, 2 * c, c), 2 * c, c);
  copy(to.striped_row, Layer(parameters, c, config.taps), c);
  copy(to.striped_col, Layer(parameters, c, config.taps), c);
  pack_ffn(to.global_ffn, parameters, c);
}

template <class Cell>
void pack_network(const NetworkConfig& config, const float* from, void* weights) {
  ParameterReader parameters(from);
  Arena arena(weights);
  const NetworkWeights<Cell> to(arena, config);
  const int64_t c = config.channels, outputs = config.in_channels * config.scale * config.scale;
  const Layer conv_1(parameters, c, config.in_channels * 9);
  pack(to.conv_1, c, config.in_channels, config.in_channels,
       [&](int64_t r, int64_t tap, int64_t channel) { return conv_1(r, channel * 9 + tap); });
  copy_bias(to.conv_1, conv_1, c);
  for (int64_t group = 0; group < config.groups; ++group) {
    pack_group(config, group_weights<Cell>(config, weights, group), parameters);
  }
  copy(to.norm, Layer(parameters, c, 1), c);
  pack_conv3x3(to.conv_2, Layer(parameters, c, c * 9), c, c);
  pack_conv3x3(to.upsampler, Layer(parameters, outputs, c * 9), outputs, c);
}

template <class Cell>
int64_t weights_bytes(const NetworkConfig& config) {
  Arena arena(nullptr);
  const NetworkWeights<Cell> outer(arena, config);
  for (int64_t group = 0; group < config.groups; ++group) GroupWeights<Cell>(arena, config);
  return arena.bytes();
}

int64_t parameters_count(const NetworkConfig& config) {
  const int64_t c = config.channels, outputs = config.in_channels * config.scale * config.scale;
  const int64_t ffn = 2 * c + 2 * c * c + 2 * c + c * c + c + 10 * c;
  int64_t local = 2 * c + 9 * c * c + c + 2 * c * c + 2 * c + 17 * c + 10 * c + c * c + c + 8 * c + config.experts * c;
  for (int64_t e = 0; e < config.experts; ++e)
    local += 2 * (config.ranks[e] * c + config.ranks[e]) + config.ranks[e] * c + c;
  local += c * c + c + ffn;
  const int64_t global = 2 * c + c * c + c + 2 * c * c + 2 * c + 2 * (config.taps + 1) * c + ffn;
  const int64_t outer = 9 * config.in_channels * c + c + 2 * c + 9 * c * c + c + 9 * c * outputs + outputs;
  return outer + config.groups * (local + global);
}

}  // namespace

NetworkSizes network_sizes(const NetworkConfig& config) {
  return {parameters_count(config), is_bfloat16(config) ? weights_bytes<Pair>(config) : weights_bytes<float>(config)};
}

void network_pack(const NetworkConfig& config, const float* parameters, void* weights, void*) {
  if (is_bfloat16(config)) {
    pack_network<Pair>(config, parameters, weights);
  } else {
    pack_network<float>(config, parameters, weights);
  }
}

}  // namespace seemore::SEEMORE_ISA
