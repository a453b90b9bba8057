// striped_conv's forward: row pass and column pass of a tile in one sweep down its lines.
//
// A window holds the last K + R - 1 lines of the intermediate; each step adds R lines by row taps and gives R lines of
// the result by column taps. Nothing but the inputs is read from memory and nothing but the result written.
#pragma once

#include "striped_conv.h"
#include "tiles.h"

namespace seemore::SEEMORE_ISA {

constexpr int kLinesAtOnce = 4;  // 4 sums and 11 weights just fit the 16 registers of AVX2

// The four parameters of `channels` channels in the accumulation type, each also backwards for the transposed passes.
template <class T, class A = Accumulate<T>>
struct StripedConvParameters {
  StripedConvParameters(const StripedConv& in, int64_t c, int64_t channels)
      : taps(in.taps), rows(6, channels * in.taps) {
    const auto *weight_row = static_cast<const T*>(in.weight_row), *weight_col = static_cast<const T*>(in.weight_col);
    const auto *bias_row = static_cast<const T*>(in.bias_row), *bias_col = static_cast<const T*>(in.bias_col);
    for (int64_t i = 0; i < channels; ++i) {
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

  // What line `h` of ds is multiplied by in the sum of all dr. (Summing dr itself would sum its rounding, too.)
  A col_sum(int64_t i, int64_t h, int64_t height) {
    A sum = 0;
    for (int64_t k = larger(int64_t(0), taps / 2 - h); k < smaller(taps, height + taps / 2 - h); ++k) {
      sum += rows[2][i * taps + k];
    }
    return sum;
  }

  int64_t taps;
  Rows<A> rows;
};

// Pooled, it leaves the sums of what is written, as it is rounded, one for each of the tile's channels; without a gate.
template <class T, int K, bool is_pooled = false>
inline void striped_conv_forward(const StripedConv& in, const Image& y, const Tile& tile, float* sums = nullptr) {
  using A = Accumulate<T>;
  constexpr int R = kLinesAtOnce;
  const int64_t half = in.taps / 2, channels = tile.channels;
  const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>), padded = width + 2 * half;
  const int64_t span = round_up(padded, kLanes<A>);
  StripedConvParameters<T> parameters(in, tile.c, channels);
  Window<A> intermediate(in.taps + R - 1, channels * span);  // at step h: lines h - half .. h + half + R - 1
  Rows<A> x(1, channels * span), gate(1, channels * span), result(R, channels * span);
  A* const out[R] = {result[0], result[1], result[2], result[3]};
  const bool is_gelu = in.activation == Activation::gelu;
  const A* factor = in.gate.data ? gate[0] : nullptr;
  Rows<A> total_rows(is_pooled ? channels : 0, kLanes<A>);
  const auto total = [&](int64_t c) { return reinterpret_cast<Vec<A>*>(total_rows[c]); };

  for (int64_t h = tile.h0 - round_up(2 * half, R); h < tile.h1; h += R) {
    intermediate.advance(R);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t line = h + half + r;
      A* to = intermediate[in.taps - 1 + r];
      if (line < 0 || line >= in.size.height) {  // the column step sees zeros there, not bias_row
        std::memset(to, 0, channels * span * sizeof(A));
      } else if (line >= tile.h0 - half && line < tile.h1 + half) {
        load_rows<T>(x[0], in.x, in.size, {tile.b, tile.c, channels, line, tile.w0 - half, span}, padded);
        for (int64_t c = 0; c < channels; ++c) {
          row_taps<K>(to + c * span, x[0] + c * span, parameters.row(c), width);
        }
      }
    }
    if (h < tile.h0) continue;
    for (int64_t c = 0; c < channels; ++c) {
      column_taps<K, R>(out, intermediate.rows(), parameters.col(c), c * span, width);
    }
    for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
      const Place place{tile.b, tile.c, channels, h + r, tile.w0, span};
      if constexpr (is_pooled) {
        for (int64_t c = 0; c < channels; ++c) {
          A* const row = out[r] + c * span;
          for (int64_t i = 0; i < width; i += kLanes<A>) {
            store(row + i, as_stored<T>(is_gelu ? gelu<A>(load(row + i)) : load(row + i)));
          }
          for (int64_t i = tile.w1 - tile.w0; i < width; ++i) row[i] = 0;
          *total(c) += row_sum(row, width);
        }
        store_rows<T>(y, place, out[r], tile.w1 - tile.w0);
        continue;
      }
      if (factor) load_rows<T>(gate[0], in.gate, in.size, place, width);
      store_rows<T>(y, place, out[r], tile.w1 - tile.w0, [is_gelu, factor](Vec<A> v, int64_t i) {
        if (is_gelu) v = gelu<A>(v);
        return factor ? v * load(factor + i) : v;
      });
    }
  }
  for (int64_t c = 0; is_pooled && c < channels; ++c) sums[c] = sum_of_lanes<A>(*total(c));
}

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
