// Products of packed weights with blocks of pixels: weight * x + bias.
#pragma once

#include "cpu/tile/blocks.h"

namespace seemore::SEEMORE_ISA {

// weight * x + bias, packed for `multiply`: rows of `weight` (rows, columns), or of it transposed. With cells that are
// Pairs x is rounded to bfloat16, a few vectors of pixels at a time; factors of rows and columns are then applied apart
// from the weights, so that they are not rounded with them.
template <class A, class Cell = A>
class Linear {
 public:
  Linear(int64_t rows, int64_t columns)
      : matrix_{round_up(rows, 2), 1, cells_of<Cell>(columns), cells_of<Cell>(columns), nullptr, nullptr},
        weights_(matrix_.size()),
        bias_(matrix_.rows),
        of_row_(matrix_.rows),
        of_column_(columns),
        count_(rows),
        columns_(columns) {
    matrix_.weights = weights_, matrix_.bias = bias_;
    for (int64_t r = 0; r < matrix_.rows; ++r) bias_[r] = 0;
  }

  template <class Element>
  void pack(const Element& element) {
    const auto one = [](int64_t) { return A{1}; };
    pack(element, one, one);
  }

  // element(row, column) * of_row(row) * of_column(column)
  template <class Element, class OfRow, class OfColumn>
  void pack(const Element& element, const OfRow& of_row, const OfColumn& of_column) {
    for (int64_t r = 0; r < matrix_.rows; ++r) of_row_[r] = r < count_ ? of_row(r) : 0;
    for (int64_t c = 0; c < columns_; ++c) of_column_[c] = of_column(c);
    SEEMORE_ISA::pack(matrix_, count_, columns_, columns_, [&](int64_t r, int64_t, int64_t c) -> A {
      return kIsBFloat16 ? element(r, c) : element(r, c) * of_row_[r] * of_column_[c];
    });
  }
  A& bias(int64_t row) { return bias_[row]; }

  // Call epilogue(row, i, sums), as `multiply`, by whole vectors.
  template <class Epilogue>
  void operator()(const A* x, int64_t row_stride, int64_t width, const Epilogue& epilogue) const {
    width = round_up(width, kLanes<A>);
    if constexpr (!kIsBFloat16) {
      const Source<A> source{x, row_stride};
      multiply(matrix_, &source, width, epilogue);
    } else {
      constexpr int64_t most = kTileVectors * kWidth;
      const Buffer<Cell> cells(matrix_.cells * most);
      const Source<Cell> source{cells, most};
      for (int64_t first = 0; first < width; first += most) {
        const int64_t count = smaller(most, width - first);
        to_cells(cells, most, x + first, row_stride, count);
        multiply(matrix_, &source, count, [&](int64_t row, int64_t i, const auto& sums) {
          constexpr int64_t R = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(sums[0][0]);
          Vec<A> scaled[R][V];
          for (int64_t r = 0; r < R; ++r) {
            for (int64_t v = 0; v < V; ++v) scaled[r][v] = sums[r][v] * of_row_[row + r];
          }
          epilogue(row, first + i, scaled);
        });
      }
    }
  }

  // out[row] = the products
  void operator()(A* out, int64_t out_row_stride, const A* x, int64_t row_stride, int64_t width) const {
    (*this)(x, row_stride, width,
            [&](int64_t row, int64_t i, const auto& sums) { store_sums(out, out_row_stride, row, i, sums); });
  }

 private:
  static constexpr bool kIsBFloat16 = kChannels<Cell> > 1;

  void to_cells(Cell* to, int64_t to_stride, const A* x, int64_t row_stride, int64_t count) const {
    for (int64_t c = 0; c < matrix_.cells; ++c) {
      for (int64_t i = 0; i < count; i += kLanes<A>) {
        const A* const channel = x + 2 * c * row_stride + i;
        const bool is_pair = 2 * c + 1 < columns_;
        const Vec<A> both[2] = {load(channel) * of_column_[2 * c],
                                is_pair ? load(channel + row_stride) * of_column_[2 * c + 1] : Vec<A>{}};
        store_cells(to + c * to_stride + i, both);
      }
    }
  }

  template <int R, int V>
  void store_sums(A* out, int64_t row_stride, int64_t row, int64_t i, const Vec<A> (&sums)[R][V]) const {
    for (int r = 0; r < R && row + r < count_; ++r) {
      for (int v = 0; v < V; ++v) store(out + (row + r) * row_stride + i + v * kLanes<A>, sums[r][v]);
    }
  }

  Matrix<Cell> matrix_;
  Buffer<Cell> weights_;
  Buffer<A> bias_, of_row_, of_column_;
  int64_t count_, columns_;
};

// The accumulation type A, and the type of cells that factors of products are rounded to: bfloat16 where all weights
// are of it and the processor multiplies it.
template <class A, class Cell>
struct Precision {};

template <class Run>
inline void with_precision(bool is_double, [[maybe_unused]] const Parameter& weight, const Run& run) {
  if (is_double) return run(Precision<double, double>());
#if defined(__AVX512BF16__)
  if (weight.dtype == DType::bfloat16) return run(Precision<float, Pair>());
#endif
  run(Precision<float, float>());
}

// Call body(r, place, sums) for the vectors of a tile's rows, of which at most `rows` exist; place: of its first pixel.
template <int R, int V, class A, class Body>
inline void each_vector(const A (&sums)[R][V], int64_t rows, const Body& body) {
  constexpr int64_t lanes = sizeof(A) / sizeof(sums[0][0][0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (r >= rows) return;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) body(r, v * lanes, sums[r][v]);
  }
}

}  // namespace seemore::SEEMORE_ISA
