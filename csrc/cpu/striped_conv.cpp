// striped_conv on the CPU: forward is striped_conv_forward.h's; backward sweeps down the lines of a tile in the same
// way.

#include "striped_conv.h"

#include "striped_conv_forward.h"

namespace seemore::SEEMORE_ISA {
namespace {

// With r = row(x), s = col(r), y = act(s) * gate, going backwards down the lines with two windows:
//   dgate = dy * act(s);  ds = dy * gate * act'(s);  dr = col transposed(ds);  dx = row transposed(dr)
//   dweight_col[k] = sum ds[h] * r[h + k - half];  dweight_row[k] = sum dr[w] * x[w + k - half]
// r and s are computed again. Rows begin `half` columns before the tile, those of x twice that.
template <class T, int K>
void backward(const StripedConv& in, const StripedConvGradients& grad, const Tile& tile, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  constexpr int R = kLinesAtOnce;
  const int64_t taps = in.taps, half = taps / 2, channels = tile.channels, sums = 2 * taps + 2;
  const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>);
  const int64_t wide = round_up(width + 2 * half, kLanes<A>), widest = wide + 2 * half;
  const int64_t span = round_up(widest, kLanes<A>);
  StripedConvParameters<T> parameters(in, tile.c, channels);
  Window<A> r_window(taps + R - 1, channels * span);   // at step h: lines h .. h + 2 * half + R - 1
  Window<A> ds_window(taps + R - 1, channels * span);  // at step h: lines h - half .. h + half + R - 1
  Rows<A> x(1, channels * span), gate(1, channels * span), s_rows(R, channels * span), dr_rows(R, channels * span);
  Rows<A> zero(1, channels * span), dx(1, channels * span), sum_rows(channels, sums * kLanes<A>);
  A* const s[R] = {s_rows[0], s_rows[1], s_rows[2], s_rows[3]};
  A* const dr[R] = {dr_rows[0], dr_rows[1], dr_rows[2], dr_rows[3]};
  const bool is_gelu = in.activation == Activation::gelu, gated = in.gate.data;
  const auto sum_of = [&](int64_t c, int64_t first) { return reinterpret_cast<Vec<A>*>(sum_rows[c]) + first; };

  for (int64_t h = tile.h0 - round_up(4 * half, R); h < tile.h1; h += R) {
    r_window.advance(R);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t line = h + 2 * half + r;
      A* to = r_window[taps - 1 + r];
      if (line < 0 || line >= in.size.height) {
        std::memset(to, 0, channels * span * sizeof(A));
      } else if (line >= tile.h0 - 2 * half && line < tile.h1 + 2 * half) {
        load_rows<T>(x[0], in.x, in.size, {tile.b, tile.c, channels, line, tile.w0 - 2 * half, span}, widest);
        for (int64_t c = 0; c < channels; ++c) row_taps<K>(to + c * span, x[0] + c * span, parameters.row(c), wide);
      }
    }
    ds_window.advance(R);
    if (h + half + R > tile.h0 - half) {
      for (int64_t c = 0; (is_gelu || gated) && c < channels; ++c) {
        column_taps<K, R>(s, r_window.rows(), parameters.col(c), c * span, wide);
      }
      const A* own[R];  // the lines of ds that are this tile's, for the weights
      for (int64_t r = 0; r < R; ++r) {
        const int64_t line = h + half + r;
        const Place place{tile.b, tile.c, channels, line, tile.w0 - half, span};
        const bool is_own = line >= tile.h0 && line < tile.h1;
        A* ds = ds_window[taps - 1 + r];
        own[r] = is_own ? ds : zero[0];
        load_rows<T>(ds, grad.dy, in.size, place, wide);
        if (gated) load_rows<T>(gate[0], in.gate, in.size, place, wide);
        for (int64_t c = 0; c < channels; ++c) {
          if (is_gelu) {
            gelu_gradient_row(s[r] + c * span, ds + c * span, wide);
          } else if (gated) {
            gate_row(s[r] + c * span, ds + c * span, wide);
          }
          if (gated) gate_row(ds + c * span, gate[0] + c * span, wide);
          if (is_own) {
            const Vec<A> line_sum = row_sum(ds + c * span + half, width);
            sum_of(c, sums - 1)[0] += line_sum;
            sum_of(c, taps)[0] += parameters.col_sum(c, line, in.size.height) * line_sum;
          }
        }
        if (gated && is_own) {
          const Place own_place{tile.b, tile.c, channels, line, tile.w0, span};
          store_rows<T>(grad.dgate, own_place, s[r] + half, tile.w1 - tile.w0);
        }
      }
      if (h + half + R > tile.h0 && h + half < tile.h1) {
        for (int64_t c = 0; c < channels; ++c) {
          column_tap_gradients<K, R>(sum_of(c, taps + 1), own, r_window.rows(), taps, c * span + half, width);
        }
      }
    }
    if (h < tile.h0) continue;
    for (int64_t c = 0; c < channels; ++c) {
      column_taps<K, R>(dr, ds_window.rows(), parameters.col_backwards(c), c * span, wide);
    }
    for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
      const Place x_place{tile.b, tile.c, channels, h + r, tile.w0 - half, span};
      load_rows<T>(x[0], in.x, in.size, x_place, width + 2 * half);
      for (int64_t c = 0; c < channels; ++c) {
        const A* row = dr[r] + c * span;
        row_taps<K>(dx[0] + c * span, row, parameters.row_backwards(c), width);
        row_tap_gradients<K>(sum_of(c, 0), row + half, x[0] + c * span, taps, width);
      }
      const Place place{tile.b, tile.c, channels, h + r, tile.w0, span};
      store_rows<T>(grad.dx, place, dx[0], tile.w1 - tile.w0);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < sums; ++i) partial[c * sums + i] = sum_of_lanes<A>(sum_of(c, 0)[i]);
  }
}

}  // namespace

void striped_conv(const StripedConv& in, const Image& y, void*) {
  with_type_and_taps(in, [&](auto* type, auto taps) {
    using T = typename Pointee<decltype(type)>::type;
    for_each_tile(tiling_of(in.size, in.x),
                  [&](const Tile& tile) { striped_conv_forward<T, taps.value>(in, y, tile); });
  });
}

StripedConvWorkspace striped_conv_workspace(const StripedConv& in) { return {tiling_of(in.size, in.x).parts(), 0}; }

void striped_conv_backward(const StripedConv& in, const StripedConvGradients& grad, void*) {
  with_type_and_taps(in, [&](auto* type, auto taps) {
    using T = typename Pointee<decltype(type)>::type;
    using A = Accumulate<T>;
    const Tiling tiling = tiling_of(in.size, in.x);
    for_each_tile(tiling, [&](const Tile& tile) {
      const int64_t place = (tiling.part(tile) * in.size.channels + tile.c) * (2 * in.taps + 2);
      backward<T, taps.value>(in, grad, tile, static_cast<A*>(grad.partial) + place);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
