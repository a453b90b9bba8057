// striped_conv's forward: row pass and column pass of a tile in one sweep down its rows.
//
// A window holds the last K + R - 1 rows of the intermediate; each step adds R rows by row taps and gives R rows of
// the result by column taps. Nothing but the inputs is read from memory and nothing but the result written.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/tile/neighbours.h"
#include "params/striped_conv.h"

namespace seemore::SEEMORE_ISA {

constexpr int kRowsPerStep = 4;  // 4 sums and 11 weights just fit the 16 registers of AVX2

// The four parameters of a tile's channels in the accumulation type, each also backwards for the transposed passes.
template <class T, class A = Accumulate<T>>
struct StripedConvParameters {
  StripedConvParameters(const StripedConv& in, int64_t channels) : in(in), taps(in.taps), rows(6, channels * in.taps) {}

  void move(const Tile& tile) {
    const auto *weight_row = static_cast<const T*>(in.weight_row), *weight_col = static_cast<const T*>(in.weight_col);
    const auto *bias_row = static_cast<const T*>(in.bias_row), *bias_col = static_cast<const T*>(in.bias_col);
    const int64_t c = tile.c;
    for (int64_t i = 0; i < tile.channels; ++i) {
      for (int64_t k = 0; k < taps; ++k) {
        rows[0][i * taps + k] = rows[1][(i + 1) * taps - 1 - k] = load_one(weight_row + (c + i) * taps + k);
        rows[2][i * taps + k] = rows[3][(i + 1) * taps - 1 - k] = load_one(weight_col + (c + i) * taps + k);
      }
      rows[4][i] = load_one(bias_row + c + i);
      rows[5][i] = load_one(bias_col + c + i);
    }
  }

  Taps<A> row(int64_t i) { return {rows[0] + i * taps, taps, rows[4][i]}; }
  Taps<A> row_backwards(int64_t i) { return {rows[1] + i * taps, taps, 0}; }
  Taps<A> col(int64_t i) { return {rows[2] + i * taps, taps, rows[5][i]}; }
  Taps<A> col_backwards(int64_t i) { return {rows[3] + i * taps, taps, 0}; }

  // The factor of row `h` of ds in the sum of all dr. (Summing dr itself would also sum its rounding.)
  A col_sum(int64_t i, int64_t h, int64_t height) {
    A sum = 0;
    for (int64_t k = larger(int64_t(0), taps / 2 - h); k < smaller(taps, height + taps / 2 - h); ++k) {
      sum += rows[2][i * taps + k];
    }
    return sum;
  }

  const StripedConv& in;
  int64_t taps;
  Rows<A> rows;
};

// Columns on either side of a row, enough for all taps: whole vectors.
template <class A>
inline int64_t margin_of(const StripedConv& in) {
  return round_up(larger(in.taps / 2, 1), kLanes<A>);
}

// striped_conv of tiles; if it pools, without a gate, with the sum of the rounded results for each of a tile's
// channels.
template <class T, int K, bool is_pooled = false>
class StripedConvForward {
 public:
  StripedConvForward(const StripedConv& in, const Image& y, const Tiling& tiling)
      : in_(in),
        y_(y),
        margin_(margin_of<A>(in)),
        columns_(round_up(tiling.widest(), kLanes<A>)),
        parameters_(in, tiling.channels),
        x_(in.x, in.size, R, tiling.channels, columns_ + 2 * margin_),
        gate_(in.gate, in.size, 1, tiling.channels, columns_),
        intermediate_(in.taps + R - 1, tiling.channels * columns_),
        result_(R, tiling.channels * columns_),
        total_rows_(is_pooled ? tiling.channels : 0, kLanes<A>) {}

  void operator()(const Tile& tile, float* sums = nullptr) {
    const int64_t half = in_.taps / 2, channels = tile.channels, width = round_up(tile.w1 - tile.w0, kLanes<A>);
    A* const out[R] = {result_[0], result_[1], result_[2], result_[3]};
    const bool is_gelu = in_.activation == Activation::gelu, is_gated = in_.gate.data;
    parameters_.move(tile);
    x_.move(tile, tile.w0, width, margin_, !kAreNear<K, A>);
    gate_.move(tile, tile.w0, width, 0, false);
    for (int64_t c = 0; is_pooled && c < channels; ++c) store(total_rows_[c], Vec<A>{});

    for (int64_t h = tile.h0 - round_up(2 * half, R); h < tile.h1; h += R) {
      intermediate_.advance(R);
      const RowRange needed =
          needed_of(h + half, R, larger(tile.h0 - half, 0), smaller(tile.h1 + half, in_.size.height));
      for (int64_t r = needed.first; r < needed.last; ++r) x_.read(r, h + half + r);
      for (int64_t r = 0; r < R; ++r) {
        A* const to = intermediate_[in_.taps - 1 + r];
        if (r < needed.first || r >= needed.last) {  // the column step sees zeros outside, not bias_row
          std::memset(to, 0, channels * width * sizeof(A));
          continue;
        }
        for (int64_t c = 0; c < channels; ++c)
          row_taps<K>(to + c * width, x_.edged_row(r, c), parameters_.row(c), width);
      }
      if (h < tile.h0) continue;
      for (int64_t c = 0; c < channels; ++c) {
        column_taps<K, R>(out, intermediate_.rows(), parameters_.col(c), c * width, width);
      }
      for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
        const Place place{tile.b, tile.c, channels, h + r, tile.w0, width};
        if constexpr (is_pooled) {
          for (int64_t c = 0; c < channels; ++c) {
            A *const row = out[r] + c * width, *const total = total_rows_[c];
            for (int64_t i = 0; i < width; i += kLanes<A>) {
              store(row + i, as_stored<T>(is_gelu ? gelu<A>(load(row + i)) : load(row + i)));
            }
            for (int64_t i = tile.w1 - tile.w0; i < width; ++i) row[i] = 0;
            store(total, load(total) + row_sum(row, width));
          }
          store_rows<T>(y_, place, out[r], tile.w1 - tile.w0);
        } else {
          if (is_gated) gate_.read(0, h + r);
          const A* const factor = is_gated ? gate_.row(0, 0) : nullptr;
          store_rows<T>(y_, place, out[r], tile.w1 - tile.w0, [is_gelu, factor](Vec<A> v, int64_t i) {
            if (is_gelu) v = gelu<A>(v);
            return factor ? v * load(factor + i) : v;
          });
        }
      }
    }
    for (int64_t c = 0; is_pooled && c < channels; ++c) sums[c] = sum_of_lanes<A>(load(total_rows_[c]));
  }

 private:
  using A = Accumulate<T>;
  static constexpr int R = kRowsPerStep;
  const StripedConv& in_;
  const Image& y_;
  int64_t margin_, columns_;
  StripedConvParameters<T> parameters_;
  RowReader<T> x_, gate_;
  RowWindow<A> intermediate_;  // at step h: rows h - half .. h + half + R - 1
  Rows<A> result_, total_rows_;
};

// Call run(T*, constant K) for the dtype and the taps that the kernels are compiled for, K = 0 for any others. float64
// serves gradcheck, not speed.
template <class Run>
inline void with_type_and_taps(const StripedConv& in, const Run& run) {
  const auto choose_taps = [&](auto* type) {
    switch (in.taps) {
      case 3:
        return run(type, Constant<3>{});
      case 7:
        return run(type, Constant<7>{});
      case 11:
        return run(type, Constant<11>{});
      default:
        return run(type, Constant<0>{});
    }
  };
  switch (in.dtype) {
    case DType::float32:
      return choose_taps(static_cast<float*>(nullptr));
    case DType::float64:
      return run(static_cast<double*>(nullptr), Constant<0>{});
    default:
      return choose_taps(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace seemore::SEEMORE_ISA
