// The chains between two global pools of the network, as stages that lines stream through (lines.h).
//
// `push` takes the next line, `pull` gives one that lags behind by as many lines, and columns, as the stage looks
// around. A stage's input line is filled by whoever comes before: open(row), fill, push(row).
#pragma once

#include "cpu/network/epilogues.h"
#include "cpu/network/ring.h"
#include "cpu/network/row_kernels.h"
#include "cpu/network/weights.h"

namespace seemore::SEEMORE_ISA {

// Calls body with the number of taps as a constant, for the sizes worth a loop of their own; 0: read at run time.
template <class Body>
inline void with_taps(int64_t taps, const Body& body) {
  if (taps == 11) return body(Constant<11>());
  if (taps == 3) return body(Constant<3>());
  body(Constant<0>());
}

// Stencils for gate_line, a vector at a time.

template <int K>
struct ColumnStencil {
  ColumnStencil(const Taps<float>& taps, const Ring<float>& lines, int64_t row, int64_t channel)
      : count(K ? K : taps.count),
        bias(taps.bias),
        stride(channel * lines.stride()),
        lines(lines),
        top(row - count / 2) {
    for (int k = 0; k < K; ++k) weight[k] = taps.weight[k], at[k] = lines[top + k] + stride;
    weights = taps.weight;
  }
  Vec<float> operator()(int64_t i) const {
    Vec<float> sum = broadcast(bias);
    if constexpr (K > 0) {
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) sum += weight[k] * load(at[k] + i);
    } else {
      for (int64_t k = 0; k < count; ++k) sum += weights[k] * load(lines[top + k] + stride + i);
    }
    return sum;
  }
  int64_t count;
  float bias;
  int64_t stride;
  const Ring<float>& lines;
  int64_t top;
  float weight[K ? K : 1];
  const float* at[K ? K : 1];
  const float* weights;
};

// 3x3 around place i - 1 of line `row`, of the channel at `offset`.
struct Stencil3x3 {
  Stencil3x3(const Taps<float>& taps, const Ring<float>& lines, int64_t row, int64_t offset) : bias(taps.bias) {
    for (int y = 0; y < 3; ++y) {
      at[y] = lines[row - 1 + y] + offset - 2;
      for (int x = 0; x < 3; ++x) weight[3 * y + x] = taps.weight[3 * y + x];
    }
  }
  Vec<float> operator()(int64_t i) const {
    Vec<float> sum = broadcast(bias);
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) {
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) sum += weight[3 * y + x] * load(at[y] + i + x);
    }
    return sum;
  }
  float bias, weight[9];
  const float* at[3];
};

// GatedFFN with its LayerNorm and residual; looks one pixel around.
template <class Cell>
class Ffn {
 public:
  Ffn(const Strip& strip, const FfnWeights<Cell>& weights, int64_t channels, int64_t lag)
      : strip_(strip),
        weights_(weights),
        channels_(channels),
        x_(strip, 2, channels, lag, 1),
        ug_(strip, 3, 2 * channels, lag, 2),
        cells_(strip.memory->take<Cell>(cells_of<Cell>(channels) * strip.widest)) {}

  float* open(int64_t row) { return x_.open(row); }
  int64_t stride() const { return x_.stride(); }

  void push(int64_t row) {
    x_.close(row);
    float* ug = ug_.open(row);
    normalise(cells_, strip_.widest, x_[row], x_.stride(), channels_, strip_.width, nullptr, nullptr);
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.expand, &source, strip_.width,
             Keep<true>{{ug, ug, ug_.stride(), ug_.stride(), 2 * channels_, 2 * channels_}});
    ug_.close(row);
  }

  void pull(int64_t row, float* to, int64_t stride) {
    gate_line(cells_, strip_.widest, ug_[row] - 1, ug_.stride(), channels_, strip_.width,
              [&](int64_t c) { return Stencil3x3(weights_.gate[c], ug_, row, (channels_ + c) * ug_.stride()); });
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.project, &source, strip_.width, Add<true>{to, x_[row] - 1, stride, x_.stride(), channels_});
  }

 private:
  const Strip& strip_;
  const FfnWeights<Cell>& weights_;
  int64_t channels_;
  Ring<float> x_, ug_;
  Cell* cells_;
};

// SEE with its LayerNorm and residual; looks taps / 2 pixels around.
template <class Cell>
class See {
 public:
  See(const Strip& strip, const GroupWeights<Cell>& weights, int64_t channels, int64_t lag)
      : strip_(strip),
        weights_(weights),
        channels_(channels),
        half_(weights.striped_row.count / 2),
        x_(strip, half_ + 1, channels, lag, half_),
        v_(strip, half_ + 1, channels, lag, half_),
        q_(strip, 1, channels, lag, 2 * half_),
        rows_(strip, 2 * half_ + 1, channels, lag + half_, 0),
        cells_(strip.memory->take<Cell>(cells_of<Cell>(channels) * strip.widest)) {}

  float* open(int64_t row) { return x_.open(row); }
  int64_t stride() const { return x_.stride(); }

  void push(int64_t row) {
    x_.close(row);
    float *q = q_.open(row), *v = v_.open(row), *rows = rows_.open(row);
    normalise(cells_, strip_.widest, x_[row], x_.stride(), channels_, strip_.width, nullptr, nullptr);
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.to_qv, &source, strip_.width,
             Keep<true>{{q, v, q_.stride(), v_.stride(), channels_, 2 * channels_}});
    q_.close(row);
    v_.close(row);
    with_taps(weights_.striped_row.count, [&](auto taps) {
      for (int64_t c = 0; c < channels_; ++c) {
        const float* around = q + c * q_.stride() - 2 * half_;
        row_taps<decltype(taps)::value>(rows + c * rows_.stride(), around, weights_.striped_row[c], strip_.width);
      }
    });
  }

  void pull(int64_t row, float* to, int64_t stride) {
    with_taps(weights_.striped_col.count, [&](auto taps) {
      gate_line(cells_, strip_.widest, v_[row] - half_, v_.stride(), channels_, strip_.width, [&](int64_t c) {
        return ColumnStencil<decltype(taps)::value>(weights_.striped_col[c], rows_, row, c);
      });
    });
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.project, &source, strip_.width, Add<false>{to, x_[row] - half_, stride, x_.stride(), channels_});
  }

 private:
  const Strip& strip_;
  const GroupWeights<Cell>& weights_;
  int64_t channels_, half_;
  Ring<float> x_, v_, q_, rows_;
  Cell* cells_;
};

// LayerNorm and dense 3x3 convolution; looks one pixel around.
template <class Cell>
class NormConv {
 public:
  NormConv(const Strip& strip, const Affine& norm, const Matrix<Cell>& conv, int64_t channels, int64_t lag)
      : strip_(strip),
        norm_(norm),
        channels_(channels),
        conv_(strip, conv, cells_of<Cell>(channels)),
        lines_(strip, 4, cells_of<Cell>(channels), lag, 2) {}

  void push(int64_t row, const float* x, int64_t stride) {
    normalise(lines_.open(row), lines_.stride(), x, stride, channels_, strip_.width, norm_.weight, norm_.bias);
    lines_.close(row);
  }

  // Lines `row` and row + 1.
  template <class First, class Second>
  void pull(int64_t row, const First& first, const Second& second) const {
    conv_(lines_, row, first, second);
  }

 private:
  const Strip& strip_;
  const Affine& norm_;
  int64_t channels_;
  Conv3x3<Cell> conv_;
  Ring<Cell> lines_;
};

// What a group keeps of an image until all of it has been pooled, line by line: x, a, and k projected for all experts.
// Their lines begin as many columns before the image as x, a and k lag, so that strips are stored at whole vectors.
template <class Cell>
struct State {
  int64_t channels, ranks, stride, lag;
  float* x;
  Cell* a;
  float* k;

  // The place of column 0 in a line.
  State at(int64_t row) const {
    const State line = from_line(row);
    return {channels, ranks, stride, lag, line.x + lag, line.a + lag + 2, line.k + lag + 1};
  }
  State from_line(int64_t row) const {
    State moved = *this;
    moved.x += row * channels * stride;
    moved.a += row * cells_of<Cell>(channels) * stride;
    moved.k += row * ranks * stride;
    return moved;
  }
  State from_column(int64_t column) const {
    State moved = *this;
    moved.x += column, moved.a += column, moved.k += column;
    return moved;
  }
};

// Sums over the image that the lines of a group leave behind.
struct Pooled {
  float* sums;                    // [row][strip][channel] of a
  float* aggregate;               // [channel][row / 4][column / 4] of k, before GELU
  int64_t strips, rows, columns;  // rows, columns: of the aggregate
};

// The end of a chain: the first half of the next group's MoE block, up to what its router must wait for. Looks one
// pixel around (conv), and one more (striped).
template <class Cell>
class Local {
 public:
  Local(const Strip& strip, const GroupWeights<Cell>& weights, int64_t channels, int64_t lag)
      : strip_(strip),
        weights_(weights),
        channels_(channels),
        ranks_(weights.experts.ranks),
        lag_(lag),
        conv_(strip, weights.norm_1, weights.conv, channels, lag),
        a_(strip, 1, channels, lag + 1, 2),
        rows_(strip, 4, channels, lag + 2, 0),
        k_(strip.memory->take<float>((channels + ranks_) * strip.widest)),
        aggregate_(strip.memory->take<float>(channels * strip.widest)),
        cells_(strip.memory->take<Cell>(2 * cells_of<Cell>(channels) * strip.widest)) {}

  void push(int64_t row, const float* x, int64_t stride) { conv_.push(row, x, stride); }

  // Convolves lines `row` and row + 1, for `expand`.
  void pull(int64_t row) {
    conv_.pull(row, Activate<Cell>{convolved(0), strip_.widest, channels_},
               Activate<Cell>{convolved(1), strip_.widest, channels_});
  }

  // Makes the line of k, and what `finish` needs of that of a; `second` of those pulled. Keeps lines of the band only.
  void expand(int64_t row, bool second, const State<Cell>& state, const Pooled& pooled, bool is_own) {
    float* a = a_.open(row);
    const Source<Cell> source{convolved(second), strip_.widest};
    const Lines to{a, k_, a_.stride(), strip_.widest, channels_, 2 * channels_ + ranks_};
    multiply(weights_.expand, &source, strip_.width, Keep<false>{to});
    a_.close(row);
    float* rows = rows_.open(row);
    for (int64_t c = 0; c < channels_; ++c) {
      row_taps<3>(rows + c * rows_.stride(), a + c * a_.stride() - 2, weights_.row[c], strip_.width);
    }
    if (!is_own) return;
    const State<Cell> line = state.at(row);
    for (int64_t r = 0; r < ranks_; ++r) {
      std::memcpy(line.k + r * state.stride + strip_.begin - lag_ - 1, k_ + (channels_ + r) * strip_.widest,
                  strip_.width * sizeof(float));
    }
    if (row / 4 < pooled.rows) aggregate(row, pooled);
  }

  // Makes the line of a, and its sums.
  void finish(int64_t row, const State<Cell>& state, const Pooled& pooled, int64_t strip) {
    constexpr int G = kChannels<Cell>;
    const int64_t first = strip_.begin - lag_ - 2;  // column of place 0
    const int64_t begin = larger(0, -first), end = smaller(strip_.width, strip_.columns - first);
    const State<Cell> line = state.at(row);
    float* sums = pooled.sums + (row * pooled.strips + strip) * channels_;
    for (int64_t c = 0; c < channels_; c += G) {
      const ColumnStencil<3> stencils[]{
          {weights_.col[c], rows_, row, c},
          {weights_.col[smaller(c + G, channels_) - 1], rows_, row, smaller(c + G, channels_) - 1}};
      Vec<float> sum[G]{};
      for (int64_t i = 0; i < strip_.width; i += kWidth) {
        Vec<float> y[G]{};
        for (int g = 0; g < G && c + g < channels_; ++g) {
          y[g] = gelu<float>(stencils[g](i));
          if (i >= begin && i + kWidth <= end) {
            sum[g] += y[g];
          } else {
            for (int64_t j = larger(0, begin - i); j < smaller(kWidth, end - i); ++j) sum[g][j] += y[g][j];
          }
        }
        store_cells(line.a + c / G * state.stride + first + i, y);
      }
      for (int g = 0; g < G && c + g < channels_; ++g) sums[c + g] = sum_of_lanes<float>(sum[g]);
    }
  }

 private:
  Cell* convolved(int64_t line) const { return cells_ + line * cells_of<Cell>(channels_) * strip_.widest; }

  // Four lines and four columns of k make one element; their columns come whole, since lag + 1 is a multiple of four.
  void aggregate(int64_t row, const Pooled& pooled) {
    const int64_t y = row % 4, first = strip_.begin - lag_ - 1;
    const int64_t begin = larger(0, -first), end = smaller(strip_.width, 4 * pooled.columns - first);
    for (int64_t c = 0; c < channels_; ++c) {
      const Taps<float> taps = weights_.aggregate[c];
      Vec<float> weight;
      for (int64_t i = 0; i < kWidth; ++i) weight[i] = taps.weight[4 * y + i % 4];
      float* sums = aggregate_ + c * strip_.widest;
      const float* k = k_ + c * strip_.widest;
      for (int64_t i = 0; i < strip_.width; i += kWidth) {
        const Vec<float> products = weight * load(k + i);
        store(sums + i, y == 0 ? products : load(sums + i) + products);
      }
      if (y < 3) continue;
      float* to = pooled.aggregate + (c * pooled.rows + row / 4) * pooled.columns;
      for (int64_t i = begin; i + 4 <= end; i += 4) {
        to[(first + i) / 4] = taps.bias + ((sums[i] + sums[i + 1]) + (sums[i + 2] + sums[i + 3]));
      }
    }
  }

  const Strip& strip_;
  const GroupWeights<Cell>& weights_;
  int64_t channels_, ranks_, lag_;
  NormConv<Cell> conv_;
  Ring<float> a_, rows_;
  float *k_, *aggregate_;
  Cell* cells_;
};

}  // namespace seemore::SEEMORE_ISA
