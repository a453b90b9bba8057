// Stages of the chains between two global pools of the network, which rows stream through (ring.h).
//
// `push` takes the next row, `pull` gives one that lags behind by the halo of the stage, in rows and columns. The input
// row of a stage is filled by the stage before: open(row), fill, push(row).
#pragma once

#include "cpu/network/epilogues.h"
#include "cpu/network/ring.h"
#include "cpu/network/row_kernels.h"
#include "cpu/network/weights.h"

namespace seemore::SEEMORE_ISA {

// Call body with the number of taps as a constant, for the sizes worth a loop of their own; 0: read at run time.
template <class Body>
inline void with_taps(int64_t taps, const Body& body) {
  if (taps == 11) return body(Constant<11>());
  if (taps == 3) return body(Constant<3>());
  body(Constant<0>());
}

// Stencils for gate_row, a vector at a time.

template <int K>
struct ColumnStencil {
  ColumnStencil(const Taps<float>& taps, const Ring<float>& rows, int64_t row, int64_t channel)
      : count(K ? K : taps.count),
        bias(taps.bias),
        offset(channel * rows.row_stride()),
        rows(rows),
        top(row - count / 2) {
    for (int k = 0; k < K; ++k) weight[k] = taps.weight[k], from[k] = rows[top + k] + offset;
    weights = taps.weight;
  }
  Vec<float> operator()(int64_t i) const {
    Vec<float> sum = broadcast(bias);
    if constexpr (K > 0) {
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) sum += weight[k] * load(from[k] + i);
    } else {
      for (int64_t k = 0; k < count; ++k) sum += weights[k] * load(rows[top + k] + offset + i);
    }
    return sum;
  }
  int64_t count;
  float bias;
  int64_t offset;
  const Ring<float>& rows;
  int64_t top;
  float weight[K ? K : 1];
  const float* from[K ? K : 1];
  const float* weights;
};

// 3x3 around place i - 1 of row `row`, of the channel at `offset`.
struct Stencil3x3 {
  Stencil3x3(const Taps<float>& taps, const Ring<float>& rows, int64_t row, int64_t offset) : bias(taps.bias) {
    for (int y = 0; y < 3; ++y) {
      from[y] = rows[row - 1 + y] + offset - 2;
      for (int x = 0; x < 3; ++x) weight[3 * y + x] = taps.weight[3 * y + x];
    }
  }
  Vec<float> operator()(int64_t i) const {
    Vec<float> sum = broadcast(bias);
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) {
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) sum += weight[3 * y + x] * load(from[y] + i + x);
    }
    return sum;
  }
  float bias, weight[9];
  const float* from[3];
};

// GatedFFN with its LayerNorm and residual; its halo is one pixel.
template <class Cell>
class Ffn {
 public:
  Ffn(const Strip& strip, const FfnWeights<Cell>& weights, int64_t channels, int64_t lag)
      : strip_(strip),
        weights_(weights),
        channels_(channels),
        x_(strip, 2, channels, lag, 1),
        ug_(strip, 3, 2 * channels, lag, 2),
        cells_(strip.memory->allocate<Cell>(cells_of<Cell>(channels) * strip.widest)) {}

  float* open(int64_t row) { return x_.open(row); }
  int64_t row_stride() const { return x_.row_stride(); }

  void push(int64_t row) {
    x_.close(row);
    float* ug = ug_.open(row);
    normalise(cells_, strip_.widest, x_[row], x_.row_stride(), channels_, strip_.width, nullptr, nullptr);
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.expand, &source, strip_.width,
             StoreEpilogue<Gelu<Cell>>{{ug, ug, ug_.row_stride(), ug_.row_stride(), 2 * channels_, 2 * channels_}});
    ug_.close(row);
  }

  void pull(int64_t row, float* to, int64_t row_stride) {
    gate_row(cells_, strip_.widest, ug_[row] - 1, ug_.row_stride(), channels_, strip_.width,
             [&](int64_t c) { return Stencil3x3(weights_.gate[c], ug_, row, (channels_ + c) * ug_.row_stride()); });
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.project, &source, strip_.width,
             ResidualEpilogue<Gelu<Cell>>{to, x_[row] - 1, row_stride, x_.row_stride(), channels_});
  }

 private:
  const Strip& strip_;
  const FfnWeights<Cell>& weights_;
  int64_t channels_;
  Ring<float> x_, ug_;
  Cell* cells_;
};

// SEE with its LayerNorm and residual; its halo is taps / 2 pixels.
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
        cells_(strip.memory->allocate<Cell>(cells_of<Cell>(channels) * strip.widest)) {}

  float* open(int64_t row) { return x_.open(row); }
  int64_t row_stride() const { return x_.row_stride(); }

  void push(int64_t row) {
    x_.close(row);
    float *q = q_.open(row), *v = v_.open(row), *rows = rows_.open(row);
    normalise(cells_, strip_.widest, x_[row], x_.row_stride(), channels_, strip_.width, nullptr, nullptr);
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.to_qv, &source, strip_.width,
             StoreEpilogue<Gelu<Cell>>{{q, v, q_.row_stride(), v_.row_stride(), channels_, 2 * channels_}});
    q_.close(row);
    v_.close(row);
    with_taps(weights_.striped_row.count, [&](auto taps) {
      for (int64_t c = 0; c < channels_; ++c) {
        const float* from = q + c * q_.row_stride() - 2 * half_;
        row_taps<decltype(taps)::value>(rows + c * rows_.row_stride(), from, weights_.striped_row[c], strip_.width);
      }
    });
  }

  void pull(int64_t row, float* to, int64_t row_stride) {
    with_taps(weights_.striped_col.count, [&](auto taps) {
      gate_row(cells_, strip_.widest, v_[row] - half_, v_.row_stride(), channels_, strip_.width,
               [&](int64_t c) { return ColumnStencil<decltype(taps)::value>(weights_.striped_col[c], rows_, row, c); });
    });
    const Source<Cell> source{cells_, strip_.widest};
    multiply(weights_.project, &source, strip_.width,
             ResidualEpilogue<Identity>{to, x_[row] - half_, row_stride, x_.row_stride(), channels_});
  }

 private:
  const Strip& strip_;
  const GroupWeights<Cell>& weights_;
  int64_t channels_, half_;
  Ring<float> x_, v_, q_, rows_;
  Cell* cells_;
};

// LayerNorm and dense 3x3 convolution; its halo is one pixel.
template <class Cell>
class NormConv {
 public:
  NormConv(const Strip& strip, const Affine& norm, const Matrix<Cell>& conv, int64_t channels, int64_t lag)
      : strip_(strip),
        norm_(norm),
        channels_(channels),
        conv_(strip, conv, cells_of<Cell>(channels)),
        input_(strip, 4, cells_of<Cell>(channels), lag, 2) {}

  void push(int64_t row, const float* x, int64_t row_stride) {
    normalise(input_.open(row), input_.row_stride(), x, row_stride, channels_, strip_.width, norm_.weight, norm_.bias);
    input_.close(row);
  }

  // Rows `row` and row + 1.
  template <class FirstEpilogue, class SecondEpilogue>
  void pull(int64_t row, const FirstEpilogue& first, const SecondEpilogue& second) const {
    conv_(input_, row, first, second);
  }

 private:
  const Strip& strip_;
  const Affine& norm_;
  int64_t channels_;
  Conv3x3<Cell> conv_;
  Ring<Cell> input_;
};

// The features of an image that a group keeps until all of it has been pooled, row by row: x, a, and k projected for
// all experts. Their rows begin as many columns before the image as x, a and k lag, so that strips are stored at whole
// vectors.
template <class Cell>
struct State {
  int64_t channels, ranks, row_stride, lag;
  float* x;
  Cell* a;
  float* k;

  // The addresses of column 0 in a row.
  State origin_of(int64_t row) const {
    const State start = from_row(row);
    return {channels, ranks, row_stride, lag, start.x + lag, start.a + lag + 2, start.k + lag + 1};
  }
  State from_row(int64_t row) const {
    State moved = *this;
    moved.x += row * channels * row_stride;
    moved.a += row * cells_of<Cell>(channels) * row_stride;
    moved.k += row * ranks * row_stride;
    return moved;
  }
  State from_column(int64_t column) const {
    State moved = *this;
    moved.x += column, moved.a += column, moved.k += column;
    return moved;
  }
};

// Columns of a that are summed up for themselves, whatever the strips; the last ones of a row are more.
constexpr int64_t kSummedColumns = 128;

// Sums over the image that the rows of a group leave behind.
struct GroupSums {
  float* sums;                   // [row][part][channel] of a, where parts are of kSummedColumns
  float* aggregate;              // [channel][row / 4][column / 4] of k, before GELU
  int64_t parts, rows, columns;  // rows, columns: of the aggregate
};

// The first half of a group's MoE block, up to its pool. Its halo is one pixel (conv), and one more (striped).
template <class Cell>
class MoEFront {
 public:
  MoEFront(const Strip& strip, const GroupWeights<Cell>& weights, int64_t channels, int64_t lag)
      : strip_(strip),
        weights_(weights),
        channels_(channels),
        ranks_(weights.experts.ranks),
        lag_(lag),
        conv_(strip, weights.norm_1, weights.conv, channels, lag),
        a_(strip, 1, channels, lag + 1, 2),
        rows_(strip, 4, channels, lag + 2, 0),
        k_(strip.memory->allocate<float>((channels + ranks_) * strip.widest)),
        aggregate_(strip.memory->allocate<float>(channels * strip.widest)),
        cells_(strip.memory->allocate<Cell>(2 * cells_of<Cell>(channels) * strip.widest)),
        partial_(strip.edges->allocate<float>((strip.last_row - strip.first_row) * channels * kWidth)) {}

  void push(int64_t row, const float* x, int64_t row_stride) { conv_.push(row, x, row_stride); }

  // Convolve rows `row` and row + 1, for `expand`.
  void pull(int64_t row) {
    conv_.pull(row, GeluCellEpilogue<Cell>{convolved(0), strip_.widest, channels_},
               GeluCellEpilogue<Cell>{convolved(1), strip_.widest, channels_});
  }

  // Compute the row of k, and the input of `finish`; `second` of the rows pulled. Rows of the band alone are stored.
  void expand(int64_t row, bool second, const State<Cell>& state, const GroupSums& group_sums, bool is_own) {
    float* a = a_.open(row);
    const Source<Cell> source{convolved(second), strip_.widest};
    const SplitRows to{a, k_, a_.row_stride(), strip_.widest, channels_, 2 * channels_ + ranks_};
    multiply(weights_.expand, &source, strip_.width, StoreEpilogue<Identity>{to});
    a_.close(row);
    float* rows = rows_.open(row);
    for (int64_t c = 0; c < channels_; ++c) {
      row_taps<3>(rows + c * rows_.row_stride(), a + c * a_.row_stride() - 2, weights_.row[c], strip_.width);
    }
    if (!is_own) return;
    const State<Cell> origin = state.origin_of(row);
    for (int64_t r = 0; r < ranks_; ++r) {
      std::memcpy(origin.k + r * state.row_stride + strip_.begin - lag_ - 1, k_ + (channels_ + r) * strip_.widest,
                  strip_.width * sizeof(float));
    }
    if (row / 4 < group_sums.rows) aggregate(row, group_sums);
  }

  // Compute the row of a, and its sums.
  void finish(int64_t row, const State<Cell>& state, const GroupSums& group_sums) {
    constexpr int G = kChannels<Cell>;
    const int64_t first = strip_.begin - lag_ - 2;  // column of place 0
    const int64_t begin = larger(0, -first), end = smaller(strip_.width, strip_.columns - first);
    const int64_t first_part = smaller(strip_.begin / kSummedColumns, group_sums.parts - 1);
    const State<Cell> origin = state.origin_of(row);
    float* sums = group_sums.sums + row * group_sums.parts * channels_;
    float* partial = partial_ + (row - strip_.first_row) * channels_ * kWidth;
    for (int64_t c = 0; c < channels_; c += G) {
      const ColumnStencil<3> stencils[]{
          {weights_.col[c], rows_, row, c},
          {weights_.col[smaller(c + G, channels_) - 1], rows_, row, smaller(c + G, channels_) - 1}};
      const int count = static_cast<int>(smaller(G, channels_ - c));
      Vec<float> sum[G]{};
      for (int g = 0; g < count && strip_.begin > first_part * kSummedColumns; ++g) {
        sum[g] = load(partial + (c + g) * kWidth);
      }
      int64_t i = 0;
      for (int64_t part = first_part; i < strip_.width; ++part) {
        const bool is_last = part == group_sums.parts - 1;
        const int64_t part_end = (part + 1) * kSummedColumns - strip_.begin;
        const int64_t stop = is_last ? strip_.width : smaller(strip_.width, part_end);
        for (; i < stop; i += kWidth) {
          Vec<float> y[G]{};
          for (int g = 0; g < count; ++g) {
            y[g] = gelu<float>(stencils[g](i));
            if (i >= begin && i + kWidth <= end) {
              sum[g] += y[g];
            } else {
              for (int64_t j = larger(0, begin - i); j < smaller(kWidth, end - i); ++j) sum[g][j] += y[g][j];
            }
          }
          store_cells(origin.a + c / G * state.row_stride + first + i, y);
        }
        const bool is_done = is_last ? strip_.is_last : stop == part_end;
        for (int g = 0; g < count; ++g) {
          if (is_done) {
            sums[part * channels_ + c + g] = sum_of_lanes<float>(sum[g]);
            sum[g] = Vec<float>{};
          } else {
            store(partial + (c + g) * kWidth, sum[g]);
          }
        }
      }
    }
  }

 private:
  Cell* convolved(int64_t number) const { return cells_ + number * cells_of<Cell>(channels_) * strip_.widest; }

  // Four rows and four columns of k make one element; their columns come together, since lag + 1 is a multiple of four.
  void aggregate(int64_t row, const GroupSums& group_sums) {
    const int64_t y = row % 4, first = strip_.begin - lag_ - 1;
    const int64_t begin = larger(0, -first), end = smaller(strip_.width, 4 * group_sums.columns - first);
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
      float* to = group_sums.aggregate + (c * group_sums.rows + row / 4) * group_sums.columns;
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
  float* partial_;  // [row][channel][lane]: sums of a part that the next strip goes on with
};

}  // namespace seemore::SEEMORE_ISA
