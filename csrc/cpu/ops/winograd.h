// Dense 3x3 convolution of slabs, and its gradient, by Winograd's F(2x2, 3x3): 16 products for each tile of four pixels
// in place of 36.
//
// Along one axis, with d the four values around a pair of pixels and g the taps,
//
//   m0 = (d0 - d2) g0     m1 = (d1 + d2) (g0 + g1 + g2) / 2     y0 = m0 + m1 + m2
//   m3 = (d1 - d3) g2     m2 = (d2 - d1) (g0 - g1 + g2) / 2     y1 = m1 - m2 - m3
//
// and so along the other: y = A^T (sum over channels of (G g G^T) * (B^T d B)) A. The gradient of g is made of the same
// transformed d: G^T (sum over tiles of (A dy A^T) * (B^T d B)) G.
#pragma once

#include "cpu/ops/slabs.h"

namespace seemore::SEEMORE_ISA {

// Elements 0, 2, .. and 1, 3, .. of `a` and `b`, one after the other; and back.
template <class V>
struct Halves {
  V first, second;
};

template <class V, size_t... i>
inline Halves<V> split_lanes(V a, V b, std::index_sequence<i...>) {
  return {__builtin_shufflevector(a, b, 2 * i...), __builtin_shufflevector(a, b, 2 * i + 1 ...)};
}

template <class V, size_t... i>
inline Halves<V> join_lanes(V a, V b, std::index_sequence<i...>) {
  constexpr size_t lanes = sizeof...(i);
  return {__builtin_shufflevector(a, b, i / 2 + i % 2 * lanes...),
          __builtin_shufflevector(a, b, lanes / 2 + i / 2 + i % 2 * lanes...)};
}

template <class V>
inline Halves<V> split(V a, V b) {
  return split_lanes(a, b, LaneIndices<V>());
}

template <class V>
inline Halves<V> join(V a, V b) {
  return join_lanes(a, b, LaneIndices<V>());
}

// The tiles of some image rows of a slab, row after row of tiles: an odd last image row or column has no partner.
struct WinogradTiles {
  WinogradTiles(const SlabWindow& window, int64_t first, int64_t last)
      : first(first), last(last), rows((last - first + 1) / 2), columns((window.width + 1) / 2) {}
  int64_t count() const { return rows * columns; }
  static int64_t most(const SlabWindow& window) { return (window.step / 2 + 2) * ((window.width + 1) / 2); }

  int64_t first, last, rows, columns;
};

// (B^T d B)[m, n] of every channel, or A dy A^T: 16 rows for each channel, [m][n][channel].
template <class A>
class Transformed {
 public:
  Transformed(const SlabWindow& window, int64_t channels)
      : channels_(channels), rows_(16 * channels, row_stride_for(WinogradTiles::most(window) + kLanes<A>)) {}

  int64_t row_stride() const { return rows_.row_stride(); }
  const A* operator[](int64_t mn) const { return rows_[mn * channels_]; }

  // Transform the input of the tiles. A vector may reach into the next row of tiles, which is computed after it.
  void transform_input(const Slab<A>& x, const WinogradTiles& tiles) {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t column = (tiles.columns - 1) / kLanes<A> * kLanes<A>; column >= 0; column -= kLanes<A>) {
        Vec<A> seen[4][4];
        along_row(seen[2], x.address(tiles.first - 1, c) + 2 * column);
        along_row(seen[3], x.address(tiles.first, c) + 2 * column);
        for (int64_t row = 0; row < tiles.rows; ++row) {
          for (int n = 0; n < 4; ++n) seen[0][n] = seen[2][n], seen[1][n] = seen[3][n];
          along_row(seen[2], x.address(tiles.first + 2 * row + 1, c) + 2 * column);
          along_row(seen[3], x.address(tiles.first + 2 * row + 2, c) + 2 * column);
          A* const to = rows_[c] + row * tiles.columns + column;
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) {
            store_number(to, 0, n, seen[0][n] - seen[2][n]);
            store_number(to, 1, n, seen[1][n] + seen[2][n]);
            store_number(to, 2, n, seen[2][n] - seen[1][n]);
            store_number(to, 3, n, seen[1][n] - seen[3][n]);
          }
        }
      }
    }
  }

  // Transform the gradient dy for the products of the tiles; image rows outside [first, last) count as 0.
  void transform_gradient(const Slab<A>& dy, const WinogradTiles& tiles, int64_t first, int64_t last) {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t row = 0; row < tiles.rows; ++row) {
        for (int64_t column = 0; column < tiles.columns; column += kLanes<A>) {
          Vec<A> along[2][4];
#pragma GCC unroll 2
          for (int y = 0; y < 2; ++y) {
            const int64_t image_row = tiles.first + 2 * row + y;
            const A* const from = dy.address(image_row, c) + 2 * column;
            auto [e0, e1] = split(load(from), load(from + kLanes<A>));
            if (image_row < first || image_row >= last) e0 = e1 = Vec<A>{};
            along[y][0] = e0, along[y][1] = e0 + e1, along[y][2] = e0 - e1, along[y][3] = -e1;
          }
          A* const to = rows_[c] + row * tiles.columns + column;
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) {
            store_number(to, 0, n, along[0][n]);
            store_number(to, 1, n, along[0][n] + along[1][n]);
            store_number(to, 2, n, along[0][n] - along[1][n]);
            store_number(to, 3, n, -along[1][n]);
          }
        }
      }
    }
  }

  // Clear a vector behind the tiles.
  void clear_behind(const WinogradTiles& tiles) {
    for (int64_t row = 0; row < 16 * channels_; ++row) store(rows_[row] + tiles.count(), Vec<A>{});
  }

 private:
  // Of a image_row, at its columns around tiles.
  static void along_row(Vec<A> (&seen)[4], const A* from) {
    const auto [d0, d1] = split(load(from - 1), load(from - 1 + kLanes<A>));
    const auto [d2, d3] = split(load(from + 1), load(from + 1 + kLanes<A>));
    seen[0] = d0 - d2, seen[1] = d1 + d2, seen[2] = d2 - d1, seen[3] = d1 - d3;
  }
  void store_number(A* to, int m, int n, Vec<A> v) const { store(to + (4 * m + n) * channels_ * row_stride(), v); }

  int64_t channels_;
  Block<A> rows_;
};

// The results of tiles, a row of each channel for each of a tile's four pixels, and their way back to image rows.
template <class A>
class Quarters {
 public:
  Quarters(const SlabWindow& window, int64_t channels)
      : rows_(4 * channels, row_stride_for(WinogradTiles::most(window) + kLanes<A>)), channels_(channels) {}

  A* row(int64_t quarter, int64_t c) const { return rows_[quarter * channels_ + c]; }

  void write(const Slab<A>& to, int64_t channels, const WinogradTiles& tiles) const {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t image_row = tiles.first; image_row < tiles.last; ++image_row) {
        const int64_t half = (image_row - tiles.first) % 2 * 2, first = (image_row - tiles.first) / 2 * tiles.columns;
        A* const out = to.address(image_row, c);
        for (int64_t j = 0; j < tiles.columns; j += kLanes<A>) {
          const auto [a, b] = join(load(row(half, c) + first + j), load(row(half + 1, c) + first + j));
          store(out + 2 * j, a);
          store(out + 2 * j + kLanes<A>, b);
        }
      }
    }
  }

 private:
  Block<A> rows_;
  int64_t channels_;
};

// G g along one axis, and G^T of the sums of the four products.
inline void transform_taps(double (&to)[4], double first, double middle, double last) {
  to[0] = first, to[1] = (first + middle + last) / 2, to[2] = (first - middle + last) / 2, to[3] = last;
}

inline void transform_back(double (&tap)[3], const double (&of)[4]) {
  const double half = (of[1] + of[2]) / 2;
  tap[0] = of[0] + half, tap[1] = (of[1] - of[2]) / 2, tap[2] = half + of[3];
}

// The kernel, transformed and packed: [m][tile of rows][channel][n][row of the tile].
template <class A>
class WinogradWeights {
 public:
  WinogradWeights(int64_t rows, int64_t channels)
      : rows_(rows), channels_(channels), weights_(16 * round_up(rows, 2) * channels), bias_(rows) {
    for (int64_t r = 0; r < rows; ++r) bias_[r] = 0;
  }

  A* bias() const { return bias_; }

  // taps(row, channel) points to the nine taps, row by row; they are packed in this order or in reverse.
  template <bool from_last, class Taps>
  void pack(const Taps& taps) {
    const int64_t of_number = 4 * round_up(rows_, 2) * channels_;
    for_each_row_tile([&](auto rows_at_once, int64_t first) {
      constexpr int R = decltype(rows_at_once)::value;
      for (int64_t c = 0; c < channels_; ++c) {
        A* const to = weights_ + 4 * (first * channels_ + R * c);
        for (int64_t r = 0; r < R; ++r) {
          double kernel_rows[3][4], both[4][4];
          const A* const tap = taps(smaller(first + r, rows_ - 1), c);
          for (int image_row = 0; image_row < 3; ++image_row) {
            const A* const row = tap + 3 * (from_last ? 2 - image_row : image_row);
            transform_taps(kernel_rows[image_row], row[from_last ? 2 : 0], row[1], row[from_last ? 0 : 2]);
          }
          for (int n = 0; n < 4; ++n) {
            double column[4];
            transform_taps(column, kernel_rows[0][n], kernel_rows[1][n], kernel_rows[2][n]);
            for (int m = 0; m < 4; ++m) both[m][n] = column[m];
          }
          for (int m = 0; m < 4; ++m) {
            for (int n = 0; n < 4; ++n) {
              to[m * of_number + n * R + r] = first + r < rows_ ? static_cast<A>(both[m][n]) : 0;
            }
          }
        }
      }
    });
  }

  // The convolution of so many tiles. All rows' products of one number m come together, so that their inputs stay in
  // the first cache.
  void operator()(const Quarters<A>& y, const Transformed<A>& d, int64_t tiles) const {
    for (int64_t i = 0; i < tiles; i += kLanes<A>) {
      const A* weight = weights_;
      for (int m = 0; m < 4; ++m) {
        for_each_row_tile([&](auto rows_at_once, int64_t first) {
          constexpr int R = decltype(rows_at_once)::value;
          Vec<A> sums[4][R];
          weight = add_up_four<R>(sums, weight, d, m, i);
          for (int r = 0; r < R && first + r < rows_; ++r) {
            A* const at[4] = {y.row(0, first + r) + i, y.row(1, first + r) + i, y.row(2, first + r) + i,
                              y.row(3, first + r) + i};
            const Vec<A> left = sums[0][r] + sums[1][r] + sums[2][r], right = sums[1][r] - sums[2][r] - sums[3][r];
            const Vec<A> bias = broadcast(bias_[first + r]);
            switch (m) {
              case 0:
                store(at[0], left + bias), store(at[1], right + bias);
                break;
              case 1:
                store(at[0], load(at[0]) + left), store(at[1], load(at[1]) + right);
                store(at[2], left + bias), store(at[3], right + bias);
                break;
              case 2:
                store(at[0], load(at[0]) + left), store(at[1], load(at[1]) + right);
                store(at[2], load(at[2]) - left), store(at[3], load(at[3]) - right);
                break;
              default:
                store(at[2], load(at[2]) - left), store(at[3], load(at[3]) - right);
            }
          }
        });
      }
    }
  }

 private:
  template <class Body>
  void for_each_row_tile(const Body& body) const {
    int64_t row = 0;
    for (; row + 6 <= round_up(rows_, 2); row += 6) body(Constant<6>(), row);
    if (row + 4 == round_up(rows_, 2)) body(Constant<4>(), row);
    if (row + 2 == round_up(rows_, 2)) body(Constant<2>(), row);
  }

  // The products of number m, and the weights that follow; never inlined, so that sums stay in registers, as
  // `add_products`.
  template <int R>
  __attribute__((noinline)) const A* add_up_four(Vec<A> (&result)[4][R], const A* weight, const Transformed<A>& d,
                                                 int m, int64_t i) const {
    const A *d0 = d[4 * m] + i, *d1 = d[4 * m + 1] + i, *d2 = d[4 * m + 2] + i, *d3 = d[4 * m + 3] + i;
    Vec<A> sums[4][R]{};
    for (int64_t c = 0; c < channels_; ++c, weight += 4 * R) {
      const int64_t at = c * d.row_stride();
      const Vec<A> x0 = load(d0 + at), x1 = load(d1 + at), x2 = load(d2 + at), x3 = load(d3 + at);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[0][r] += x0 * weight[r];
        sums[1][r] += x1 * weight[R + r];
        sums[2][r] += x2 * weight[2 * R + r];
        sums[3][r] += x3 * weight[3 * R + r];
      }
    }
    std::memcpy(result, sums, sizeof(sums));
    return weight;
  }

  int64_t rows_, channels_;
  Buffer<A> weights_, bias_;
};

// A convolution on the tiles of slabs, to `rows` channels.
template <class A>
inline void convolve(const Slab<A>& to, int64_t rows, const WinogradWeights<A>& weights, const Transformed<A>& d,
                     const Quarters<A>& quarters, const WinogradTiles& tiles) {
  weights(quarters, d, tiles.count());
  quarters.write(to, rows, tiles);
}

}  // namespace seemore::SEEMORE_ISA
