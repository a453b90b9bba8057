// The work at a group's global pool: the small map of the calibration, the choice of experts, and their matrices.
#pragma once

#include "cpu/network/stages.h"
#include "cpu/tile/bilinear.h"
#include "params/router.h"

namespace seemore::SEEMORE_ISA {

// Positions of an image's columns on a narrower map (bilinear, align_corners = False).
struct ColumnTable {
  ColumnTable(Arena& arena, int64_t count, int64_t columns, int64_t map_columns)
      : left(arena.allocate<int32_t>(count)),
        right(arena.allocate<int32_t>(count)),
        share(arena.allocate<float>(count)) {
    if (!left) return;
    for (int64_t i = 0; i < count; ++i) {
      const BilinearPosition position(smaller(i, columns - 1), columns, map_columns);
      left[i] = static_cast<int32_t>(position.before), right[i] = static_cast<int32_t>(position.after);
      share[i] = static_cast<float>(position.share);
    }
  }

  int32_t *left, *right;
  float* share;
};

// The state of one image between two sweeps.
template <class Cell>
class RoutingState {
 public:
  RoutingState(Arena& arena, const NetworkConfig& config, const Size& size)
      : config_(config),
        height_(size.height),
        pixels_(size.height * size.width),
        rows_(size.height / 4),
        columns_(size.width / 4),
        map_rows_(size.height),
        map_columns_(size.width) {
    for (int64_t i = 0; i < config.recursive; ++i) map_rows_ /= 4, map_columns_ /= 4;
    const int64_t c = config.channels, ranks = all_ranks(config);
    for (float*& maps : maps_) maps = arena.allocate<float>(c * rows_ * columns_);
    s_ = arena.allocate<float>(ranks * map_rows_ * map_columns_);
    chosen_ = arena.allocate<int64_t>(ranks);
    count_ = arena.allocate<int64_t>(1);
    project_a_ = allocate_matrix<Cell>(arena, ranks, 1, c);
    mix_ = allocate_matrix<Cell>(arena, c, 2, c, ranks);
  }

  GroupSums group_sums(float* sums, int64_t parts) const { return {sums, maps_[0], parts, rows_, columns_}; }
  int64_t map_rows() const { return map_rows_; }
  int64_t map_columns() const { return map_columns_; }

  // Of the chosen experts: rows of the packed projections, in cells of two or one; k's row of each.
  int64_t ranks() const { return count_ ? *count_ : 0; }  // null: memory is only counted
  int64_t row_of_k(int64_t i) const { return chosen_[i]; }
  const float* small_map(int64_t i, int64_t row) const { return s_ + (i * map_rows_ + row) * map_columns_; }
  Matrix<Cell> project_a() const {
    Matrix<Cell> matrix = project_a_;
    matrix.rows = ranks();
    return matrix;
  }
  Matrix<Cell> mix() const {
    Matrix<Cell> matrix = mix_;
    matrix.last_cells = cells_of<Cell>(ranks());
    return matrix;
  }

  // Compute a channel of the small map from its aggregate.
  void calibrate(const GroupWeights<Cell>& weights, int64_t channel) const {
    float* from = maps_[0] + channel * rows_ * columns_;
    float* to = maps_[1] + channel * rows_ * columns_;
    int64_t rows = rows_, columns = columns_;
    activate(from, rows * columns);
    for (int64_t i = 1; i < config_.recursive; ++i) {
      aggregate(to, from, rows / 4, columns / 4, columns, weights.aggregate[channel]);
      rows /= 4, columns /= 4;
      activate(to, rows * columns);
      float* filled = to;
      to = from, from = filled;
    }
    convolve(to, from, rows, columns, weights.calibrate[channel]);
  }

  // Choose the experts from the sums of a, by the decision of the router's operator, and pack their matrices.
  void choose(const ExpertWeights& experts, const float* sums, int64_t parts) const {
    const int64_t c = config_.channels, ranks = experts.ranks;
    const Buffer<float> mean(c), probability(config_.experts), expert_weight(config_.top_k);
    const Buffer<int64_t> expert_index(config_.top_k);
    route({DType::float32, DType::float32, 1, c, config_.experts, config_.top_k, experts.router},
          {sums, height_ * parts, pixels_, expert_index, expert_weight, mean, probability}, nullptr);
    Buffer<float> share(ranks), bias(c);
    for (int64_t i = 0; i < c; ++i) bias[i] = experts.bias_proj[i];
    *count_ = 0;
    for (int64_t n = 0; n < config_.top_k; ++n) {
      const int64_t expert = expert_index[n];
      int64_t first = 0;
      for (int64_t e = 0; e < expert; ++e) first += padded_rank(config_.ranks[e]);
      for (int64_t r = 0; r < padded_rank(config_.ranks[expert]); ++r, ++*count_) {
        chosen_[*count_] = first + r;
        share[*count_] = expert_weight[n];
      }
      for (int64_t i = 0; i < c; ++i) bias[i] += expert_weight[n] * experts.bias_out[expert * c + i];
    }
    const Matrix<Cell> a = project_a(), mixed = mix();
    pack(a, a.rows, c, c, [&](int64_t r, int64_t, int64_t i) { return experts.weight_a[chosen_[r] * c + i]; });
    for (int64_t r = 0; r < a.rows; ++r) a.bias[r] = experts.bias_a[chosen_[r]];
    pack(mixed, c, c, *count_, [&](int64_t r, int64_t source, int64_t i) {
      return source == 0 ? experts.weight_proj[r * c + i] : share[i] * experts.weight_out[r * ranks + chosen_[i]];
    });
    for (int64_t r = 0; r < mixed.rows; ++r) mixed.bias[r] = r < c ? bias[r] : 0;
    const int64_t map = map_rows_ * map_columns_;
    const float* calibrated = maps_[config_.recursive % 2];
    for (int64_t r = 0; r < *count_; ++r) {
      float* to = s_ + r * map;
      for (int64_t i = 0; i < map; ++i) to[i] = experts.bias_s[chosen_[r]];
      for (int64_t channel = 0; channel < c; ++channel) {
        const float weight = experts.weight_s[chosen_[r] * c + channel];
        const float* from = calibrated + channel * rows_ * columns_;
        for (int64_t i = 0; i < map; ++i) to[i] += weight * from[i];
      }
    }
  }

 private:
  static void activate(float* map, int64_t count) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(map + i, gelu<float>(load(map + i)));
    if (i == count) return;
    float last[kWidth] = {};
    std::memcpy(last, map + i, (count - i) * sizeof(float));
    store(last, gelu<float>(load(last)));
    std::memcpy(map + i, last, (count - i) * sizeof(float));
  }

  static void aggregate(float* to, const float* from, int64_t rows, int64_t columns, int64_t row_stride,
                        const Taps<float>& taps) {
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < columns; ++x) {
        float sum = taps.bias;
        for (int64_t k = 0; k < 16; ++k) sum += taps.weight[k] * from[(4 * y + k / 4) * row_stride + 4 * x + k % 4];
        to[y * columns + x] = sum;
      }
    }
  }

  static void convolve(float* to, const float* from, int64_t rows, int64_t columns, const Taps<float>& taps) {
    for (int64_t y = 0; y < rows; ++y) {
      float* out = to + y * columns;
      for (int64_t x = 0; x < columns; ++x) out[x] = taps.bias;
      for (int64_t k = 0; k < 9; ++k) {
        const int64_t source = y + k / 3 - 1, shift = k % 3 - 1;
        if (source < 0 || source >= rows) continue;
        const float* in = from + source * columns + shift;
        const float weight = taps.weight[k];
        for (int64_t x = shift < 0 ? 1 : 0; x < columns - (shift > 0 ? 1 : 0); ++x) out[x] += weight * in[x];
      }
    }
  }

  const NetworkConfig& config_;
  int64_t height_, pixels_, rows_, columns_, map_rows_, map_columns_;
  float* maps_[2];
  float* s_;
  int64_t *chosen_, *count_;
  Matrix<Cell> project_a_, mix_;
};

}  // namespace seemore::SEEMORE_ISA
