// striped_conv on the CPU: forward is in striped_conv_forward.h; backward sweeps down the rows of a tile in the same
// way.

#include "params/striped_conv.h"

#include "cpu/ops/striped_conv_forward.h"

namespace seemore::SEEMORE_ISA {
namespace {

// y = act(s) * gate:  dgate = dy * act(s);  ds = dy * gate * act'(s). Without a gate, `gate` and `dgate` are null.
template <bool is_gelu, class A>
inline void activation_gradients(A* ds, A* dgate, const A* s, const A* dy, const A* gate, int64_t length) {
  for (int64_t i = 0; i < length; i += kLanes<A>) {
    Vec<A> d = load(dy + i);
    if constexpr (is_gelu) {
      const Vec<A> x = load(s + i);
      if (dgate) store(dgate + i, d * gelu<A>(x));
      d *= gelu_gradient<A>(x);
    } else if (dgate) {
      store(dgate + i, d * load(s + i));
    }
    store(ds + i, gate ? d * load(gate + i) : d);
  }
}

// With r = row(x), s = col(r), y = act(s) * gate, going down the rows with two windows:
//   dgate = dy * act(s);  ds = dy * gate * act'(s);  dr = col transposed(ds);  dx = row transposed(dr)
//   dweight_col[k] = sum ds[h] * r[h + k - half];  dweight_row[k] = sum dr[w] * x[w + k - half]
// r and s are recomputed. Where the tile has neighbours beside it, rows begin `halo` columns before it.
template <class T, int K, class A = Accumulate<T>>
class StripedConvBackward {
 public:
  StripedConvBackward(const StripedConv& in, const StripedConvGradients& grad, const Tiling& tiling)
      : in_(in),
        grad_(grad),
        margin_(margin_of<A>(in)),
        columns_(round_up(tiling.widest(), kLanes<A>) + (tiling.columns > 1 ? 2 * margin_ : 0)),
        parameters_(in, tiling.channels),
        x_(in.x, in.size, R, tiling.channels, columns_ + 2 * margin_),
        own_x_(in.x, in.size, 1, tiling.channels, columns_ + 2 * margin_),
        dy_(grad.dy, in.size, 1, tiling.channels, columns_),
        gate_(in.gate, in.size, 1, tiling.channels, columns_),
        r_window_(in.taps + R - 1, tiling.channels * columns_),
        ds_window_(in.taps + R - 1, tiling.channels * columns_),
        s_rows_(R, tiling.channels * columns_),
        dr_rows_(R, tiling.channels * (columns_ + 2 * margin_)),
        dx_(1, tiling.channels * columns_),
        sum_rows_(tiling.channels, (2 * in.taps + 2) * kLanes<A>) {}

  void operator()(const Tile& tile, A* partial) {
    const int64_t taps = in_.taps, half = taps / 2, channels = tile.channels, sums = 2 * taps + 2;
    const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>);
    const int64_t halo = tile.w0 > 0 || tile.w1 < in_.size.width ? margin_ : 0, wide = width + 2 * halo;
    const int64_t padded = wide + 2 * margin_;
    const bool is_gelu = in_.activation == Activation::gelu, is_gated = in_.gate.data, far = !kAreNear<K, A>;
    A *s[R], *dr[R];
    for (int r = 0; r < R; ++r) {
      s[r] = s_rows_[r], dr[r] = dr_rows_[r] + margin_;
      std::memset(dr_rows_[r], 0, channels * padded * sizeof(A));  // the margins stay so
    }
    for (int64_t c = 0; c < channels; ++c) std::memset(sum_rows_[c], 0, sums * sizeof(Vec<A>));
    parameters_.move(tile);
    x_.move(tile, tile.w0 - halo, wide, margin_, far);
    own_x_.move(tile, tile.w0, width, margin_, far);
    dy_.move(tile, tile.w0 - halo, wide, 0, false);
    gate_.move(tile, tile.w0 - halo, wide, 0, false);
    const auto sum_of = [&](int64_t c, int64_t first) { return reinterpret_cast<Vec<A>*>(sum_rows_[c]) + first; };
    const auto needed_within = [&](int64_t row, int64_t halo_rows) {
      return needed_of(row, R, larger(tile.h0 - halo_rows, 0), smaller(tile.h1 + halo_rows, in_.size.height));
    };

    for (int64_t h = tile.h0 - round_up(4 * half, R); h < tile.h1; h += R) {
      r_window_.advance(R);
      const RowRange r_rows = needed_within(h + 2 * half, 2 * half);
      for (int64_t r = r_rows.first; r < r_rows.last; ++r) x_.read(r, h + 2 * half + r);
      for (int64_t r = 0; r < R; ++r) {
        A* const to = r_window_[taps - 1 + r];
        if (r < r_rows.first || r >= r_rows.last) {
          std::memset(to, 0, channels * wide * sizeof(A));
          continue;
        }
        for (int64_t c = 0; c < channels; ++c) row_taps<K>(to + c * wide, x_.edged_row(r, c), parameters_.row(c), wide);
      }

      ds_window_.advance(R);
      const RowRange ds_range = needed_within(h + half, half), own = needed_within(h + half, 0);
      const bool is_any = ds_range.first < ds_range.last;
      for (int64_t c = 0; is_any && (is_gelu || is_gated) && c < channels; ++c) {
        column_taps<K, R>(s, r_window_.rows(), parameters_.col(c), c * wide, wide);
      }
      const A* ds_rows[R];
      for (int64_t r = 0; r < R; ++r) {
        A* const ds = ds_window_[taps - 1 + r];
        ds_rows[r] = ds;
        if (r < ds_range.first || r >= ds_range.last) {
          std::memset(ds, 0, channels * wide * sizeof(A));
          continue;
        }
        const int64_t image_row = h + half + r;
        const bool is_own = r >= own.first && r < own.last;
        dy_.read(0, image_row);
        if (is_gated) gate_.read(0, image_row);
        for (int64_t c = 0; c < channels; ++c) {
          const A* const factor = is_gated ? gate_.row(0, c) : nullptr;
          A *const from = s[r] + c * wide, *const dgate = is_gated ? from : nullptr;
          if (is_gelu) {
            activation_gradients<true>(ds + c * wide, dgate, from, dy_.row(0, c), factor, wide);
          } else {
            activation_gradients<false>(ds + c * wide, dgate, from, dy_.row(0, c), factor, wide);
          }
          if (is_own) {
            const Vec<A> row_total = row_sum(ds + c * wide + halo, width);
            *sum_of(c, sums - 1) += row_total;
            *sum_of(c, taps) += parameters_.col_sum(c, image_row, in_.size.height) * row_total;
          }
        }
        if (is_gated && is_own) {
          const Place place{tile.b, tile.c, channels, image_row, tile.w0, wide};
          store_rows<T>(grad_.dgate, place, s[r] + halo, tile.w1 - tile.w0);
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        Vec<A>* const to = sum_of(c, taps + 1);
        if (own.first == 0 && own.last == R) {
          column_tap_gradients<K, R>(to, ds_rows, r_window_.rows(), taps, c * wide + halo, width);
          continue;
        }
        for (int64_t r = own.first; r < own.last; ++r) {
          column_tap_gradients<K, 1>(to, ds_rows + r, r_window_.rows() + r, taps, c * wide + halo, width);
        }
      }

      if (h < tile.h0) continue;
      for (int64_t c = 0; c < channels; ++c) {
        A* to[R];
        for (int64_t r = 0; r < R; ++r) to[r] = dr[r] + c * (padded - wide);
        column_taps<K, R>(to, ds_window_.rows(), parameters_.col_backwards(c), c * wide, wide);
      }
      for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
        own_x_.read(0, h + r);
        for (int64_t c = 0; c < channels; ++c) {
          const A* const row = dr[r] + c * padded + halo;
          const EdgedRow<A> edged{row, load(row - kLanes<A>), load(row + width)};
          row_taps<K>(dx_[0] + c * width, edged, parameters_.row_backwards(c), width);
          row_tap_gradients<K>(sum_of(c, 0), row, own_x_.edged_row(0, c), taps, width);
        }
        store_rows<T>(grad_.dx, {tile.b, tile.c, channels, h + r, tile.w0, width}, dx_[0], tile.w1 - tile.w0);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < sums; ++i) partial[c * sums + i] = sum_of_lanes<A>(sum_of(c, 0)[i]);
    }
  }

 private:
  static constexpr int R = kRowsPerStep;
  const StripedConv& in_;
  const StripedConvGradients& grad_;
  int64_t margin_, columns_;
  StripedConvParameters<T> parameters_;
  RowReader<T> x_, own_x_, dy_, gate_;
  RowWindow<A> r_window_;   // at step h: rows h .. h + 2 * half + R - 1
  RowWindow<A> ds_window_;  // at step h: rows h - half .. h + half + R - 1
  Rows<A> s_rows_, dr_rows_, dx_, sum_rows_;
};

}  // namespace

void striped_conv(const StripedConv& in, const Image& y, void*) {
  with_type_and_taps(in, [&](auto* type, auto taps) {
    using T = typename Pointee<decltype(type)>::type;
    using Forward = StripedConvForward<T, taps.value>;
    const Tiling tiling = tiling_of(in.size, in.x);
    const auto make = [&] { return Forward(in, y, tiling); };
    for_each_tile(tiling, make, [](const Tile& tile, Forward& forward) { forward(tile); });
  });
}

StripedConvWorkspace striped_conv_workspace(const StripedConv& in) { return {tiling_of(in.size, in.x).parts(), 0}; }

void striped_conv_backward(const StripedConv& in, const StripedConvGradients& grad, void*) {
  with_type_and_taps(in, [&](auto* type, auto taps) {
    using T = typename Pointee<decltype(type)>::type;
    using A = Accumulate<T>;
    const Tiling tiling = tiling_of(in.size, in.x);
    const auto make = [&] { return StripedConvBackward<T, taps.value>(in, grad, tiling); };
    for_each_tile(tiling, make, [&](const Tile& tile, StripedConvBackward<T, taps.value>& backward) {
      const int64_t place = (tiling.part(tile) * in.size.channels + tile.c) * (2 * in.taps + 2);
      backward(tile, static_cast<A*>(grad.partial) + place);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
