// striped_conv on the CPU: row pass and column pass of a tile in one sweep down its lines.
//
// A window holds the last K + R - 1 lines of the intermediate; each step adds R lines by row taps and gives R lines of
// the result by column taps. Nothing but the inputs is read from memory and nothing but the result written.

#include "striped_conv.h"

#include "parallel.h"
#include "rows.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int R = 4;  // lines at once: 4 sums and 11 weights just fit the 16 registers of AVX2

// Part of the images that one task works on: `channels` > 1 where the channels lie side by side in memory.
struct Tile {
  int64_t b, c, channels, h0, h1, w0, w1;
};

struct Tiling {
  Tiling(const Size& size, int64_t channels_at_once, int64_t widest) : size(size), channels(channels_at_once) {
    blocks = (size.channels + channels - 1) / channels;
    constexpr int64_t highest = 256;
    bands = (size.height + highest - 1) / highest;
    height = (size.height + bands - 1) / (bands ? bands : 1);
    width = widest;
    columns = (size.width + width - 1) / width;
  }

  // The split depends on sizes alone, so that results do not depend on the number of threads.
  int64_t parts() const { return size.batch * bands * columns; }
  int64_t count() const { return parts() * blocks; }

  Tile operator[](int64_t i) const {
    const int64_t column = i % columns, band = i / columns % bands;
    const int64_t c = i / columns / bands % blocks * channels, b = i / columns / bands / blocks;
    return {b,
            c,
            smaller(channels, size.channels - c),
            band * height,
            smaller((band + 1) * height, size.height),
            column * width,
            smaller((column + 1) * width, size.width)};
  }
  int64_t part(const Tile& tile) const { return (tile.b * bands + tile.h0 / height) * columns + tile.w0 / width; }

  Size size;
  int64_t channels, blocks, bands, height, columns, width;
};

Tiling tiling_of(const StripedConv& in) {
  const bool interleaved = in.x.column != 1 && in.x.channel == 1;
  return interleaved ? Tiling(in.size, smaller(larger(1, in.size.channels), 64), 64) : Tiling(in.size, 1, 1024);
}

// The four parameters of `channels` channels in the accumulation type, each also backwards for the transposed passes.
template <class T, class A = Accumulate<T>>
struct Parameters {
  Parameters(const StripedConv& in, int64_t c, int64_t channels) : taps(in.taps), rows(6, channels * in.taps) {
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

template <class T, int K>
void forward(const StripedConv& in, const Image& y, const Tile& tile) {
  using A = Accumulate<T>;
  const int64_t half = in.taps / 2, channels = tile.channels;
  const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>), padded = width + 2 * half;
  const int64_t span = round_up(padded, kLanes<A>);
  Parameters<T> parameters(in, tile.c, channels);
  Window<A> intermediate(in.taps + R - 1, channels * span);  // at step h: lines h - half .. h + half + R - 1
  Rows<A> x(1, channels * span), gate(1, channels * span), result(R, channels * span);
  A* const out[R] = {result[0], result[1], result[2], result[3]};
  const bool is_gelu = in.activation == Activation::gelu;
  const A* factor = in.gate.data ? gate[0] : nullptr;

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
      if (factor) load_rows<T>(gate[0], in.gate, in.size, place, width);
      store_rows<T>(y, place, out[r], tile.w1 - tile.w0, [is_gelu, factor](Vec<A> v, int64_t i) {
        if (is_gelu) v = gelu<A>(v);
        return factor ? v * load(factor + i) : v;
      });
    }
  }
}

// With r = row(x), s = col(r), y = act(s) * gate, going backwards down the lines with two windows:
//   dgate = dy * act(s);  ds = dy * gate * act'(s);  dr = col transposed(ds);  dx = row transposed(dr)
//   dweight_col[k] = sum ds[h] * r[h + k - half];  dweight_row[k] = sum dr[w] * x[w + k - half]
// r and s are computed again. Rows begin `half` columns before the tile, those of x twice that.
template <class T, int K>
void backward(const StripedConv& in, const StripedConvGradients& grad, const Tile& tile, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  const int64_t taps = in.taps, half = taps / 2, channels = tile.channels, sums = 2 * taps + 2;
  const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>);
  const int64_t wide = round_up(width + 2 * half, kLanes<A>), widest = wide + 2 * half;
  const int64_t span = round_up(widest, kLanes<A>);
  Parameters<T> parameters(in, tile.c, channels);
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

template <class Task>
void each_tile(const Tiling& tiling, const Task& task) {
  struct Context {
    const Tiling& tiling;
    const Task& task;
  } context{tiling, task};
  parallel_for(
      tiling.count(),
      [](const void* pointer, int64_t begin, int64_t end) {
        const auto& [tiling, task] = *static_cast<const Context*>(pointer);
        for (int64_t i = begin; i < end; ++i) task(tiling[i]);
      },
      &context);
}

// Call run(T*, constant K) for the dtype and the taps that the kernels are compiled for, K = 0 for any others. float64
// serves gradcheck, not speed.
template <class Run>
void choose(const StripedConv& in, const Run& run) {
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

}  // namespace

void striped_conv(const StripedConv& in, const Image& y, void*) {
  choose(in, [&](auto* type, auto taps) {
    using T = typename Pointee<decltype(type)>::type;
    each_tile(tiling_of(in), [&](const Tile& tile) { forward<T, taps.value>(in, y, tile); });
  });
}

StripedConvWorkspace striped_conv_workspace(const StripedConv& in) { return {tiling_of(in).parts(), 0}; }

void striped_conv_backward(const StripedConv& in, const StripedConvGradients& grad, void*) {
  choose(in, [&](auto* type, auto taps) {
    using T = typename Pointee<decltype(type)>::type;
    using A = Accumulate<T>;
    const Tiling tiling = tiling_of(in);
    each_tile(tiling, [&](const Tile& tile) {
      const int64_t place = (tiling.part(tile) * in.size.channels + tile.c) * (2 * in.taps + 2);
      backward<T, taps.value>(in, grad, tile, static_cast<A*>(grad.partial) + place);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
