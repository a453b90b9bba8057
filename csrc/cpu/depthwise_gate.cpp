// depthwise_gate on the CPU: y = u * s, s = depthwise_3x3(g) + bias, in one sweep down the lines of a tile.
//
// A window holds the last R + 2 lines of g, of which each step makes R lines of s. Backward has a second one, of
// dc = dy * u, the gradient of s; both read every image once.

#include "depthwise_gate.h"

#include "stencils.h"
#include "tiles.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int R = 4;       // lines at once
constexpr int kSums = 10;  // of a channel: the gradients of nine weights and the bias

// Weights and bias of a tile's channels in the accumulation type, weights also backwards for the transposed stencil.
template <class T, class A = Accumulate<T>>
struct Parameters {
  Parameters(const DepthwiseGate& in, const Tile& tile) : rows(3, tile.channels * 9) {
    const auto *weight = static_cast<const T*>(in.weight), *bias = static_cast<const T*>(in.bias);
    for (int64_t c = 0; c < tile.channels; ++c) {
      for (int64_t k = 0; k < 9; ++k) {
        rows[0][c * 9 + k] = rows[1][c * 9 + 8 - k] = load_one(weight + (tile.c + c) * 9 + k);
      }
      rows[2][c] = load_one(bias + tile.c + c);
    }
  }

  Taps<A> taps(int64_t c) { return {rows[0] + c * 9, 9, rows[2][c]}; }
  Taps<A> backwards(int64_t c) { return {rows[1] + c * 9, 9, 0}; }

  Rows<A> rows;
};

template <class T>
void forward(const DepthwiseGate& in, const Image& y, const Tile& tile) {
  using A = Accumulate<T>;
  const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>), padded = width + 2;
  const int64_t span = round_up(padded, kLanes<A>);
  Parameters<T> parameters(in, tile);
  Window<A> g(R + 2, tile.channels * span);  // at step h: lines h - 1 .. h + R, from a column before the tile on
  Rows<A> u(1, tile.channels * span), s(R, tile.channels * span);
  A* const out[R] = {s[0], s[1], s[2], s[3]};
  const A* const factor = u[0];

  for (int64_t h = tile.h0 - R; h < tile.h1; h += R) {
    g.advance(R);
    for (int64_t r = h < tile.h0 ? R - 2 : 0; r < R; ++r) {
      const int64_t line = h + 1 + r;
      if (line > tile.h1) break;  // of lines that are not stored
      load_rows<T>(g[2 + r], in.g, in.size, {tile.b, tile.c, tile.channels, line, tile.w0 - 1, span}, padded);
    }
    if (h < tile.h0) continue;
    for (int64_t c = 0; c < tile.channels; ++c) stencil_3x3<R>(out, g.rows(), parameters.taps(c), c * span, width);
    for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
      const Place place{tile.b, tile.c, tile.channels, h + r, tile.w0, span};
      load_rows<T>(u[0], in.u, in.size, place, width);
      store_rows<T>(y, place, out[r], tile.w1 - tile.w0,
                    [factor](Vec<A> v, int64_t i) { return load(factor + i) * v; });
    }
  }
}

//   du = dy * s;  dc = dy * u;  dg = stencil transposed(dc);  dweight[k] = sum dc * what tap k sees of g
template <class T>
void backward(const DepthwiseGate& in, const DepthwiseGateGradients& grad, const Tile& tile, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>), padded = width + 2;
  const int64_t span = round_up(padded, kLanes<A>);
  Parameters<T> parameters(in, tile);
  Window<A> g(R + 2, tile.channels * span);   // at step h: lines h .. h + R + 1
  Window<A> dc(R + 2, tile.channels * span);  // at step h: lines h - 1 .. h + R
  Rows<A> dy(R, tile.channels * span), u(1, tile.channels * span), s(R, tile.channels * span);
  Rows<A> sum_rows(tile.channels, kSums * kLanes<A>);
  A* const out[R] = {s[0], s[1], s[2], s[3]};

  for (int64_t h = tile.h0 - R; h < tile.h1; h += R) {
    g.advance(R);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t line = h + 2 + r;
      if (line < tile.h0 - 1 || line > tile.h1) continue;
      load_rows<T>(g[2 + r], in.g, in.size, {tile.b, tile.c, tile.channels, line, tile.w0 - 1, span}, padded);
    }
    dc.advance(R);
    const int64_t first = larger(0, tile.h0 - h - 1), last = smaller(R, tile.h1 - h - 1);  // of them, this tile's own
    const A* centre[R];
    for (int64_t r = 0; r < R; ++r) {
      const int64_t line = h + 1 + r;
      A* const to = dc[2 + r];
      centre[r] = to + 1;
      if (line < tile.h0 - 1 || line > tile.h1) continue;
      const Place place{tile.b, tile.c, tile.channels, line, tile.w0 - 1, span};
      load_rows<T>(dy[r], grad.dy, in.size, place, padded);
      load_rows<T>(to, in.u, in.size, place, padded);
      for (int64_t c = 0; c < tile.channels; ++c) gate_row(to + c * span, dy[r] + c * span, padded);
    }
    for (int64_t c = 0; c < tile.channels; ++c) {
      stencil_3x3<R>(out, g.rows(), parameters.taps(c), c * span, width);
      auto* const sums = reinterpret_cast<Vec<A>*>(sum_rows[c]);
      if (first == 0 && last == R) {
        stencil_3x3_gradients<R>(sums, centre, g.rows(), c * span, width);
      } else {
        for (int64_t r = first; r < last; ++r) {
          stencil_3x3_gradients<1>(sums, centre + r, g.rows() + r, c * span, width);
        }
      }
    }
    for (int64_t r = first; r < last; ++r) {
      const Place place{tile.b, tile.c, tile.channels, h + 1 + r, tile.w0, span};
      const A* const factor = dy[r] + 1;
      store_rows<T>(grad.du, place, out[r], tile.w1 - tile.w0,
                    [factor](Vec<A> v, int64_t i) { return load(factor + i) * v; });
    }
    if (h < tile.h0) continue;
    for (int64_t c = 0; c < tile.channels; ++c)
      stencil_3x3<R>(out, dc.rows(), parameters.backwards(c), c * span, width);
    for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
      const Place place{tile.b, tile.c, tile.channels, h + r, tile.w0, span};
      store_rows<T>(grad.dg, place, out[r], tile.w1 - tile.w0);
    }
  }
  for (int64_t c = 0; c < tile.channels; ++c) {
    const auto* const sums = reinterpret_cast<const Vec<A>*>(sum_rows[c]);
    for (int64_t i = 0; i < kSums; ++i) partial[c * kSums + i] = sum_of_lanes<A>(sums[i]);
  }
}

}  // namespace

void depthwise_gate(const DepthwiseGate& in, const Image& y, void*) {
  with_type(in.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    for_each_tile(tiling_of(in.size, in.g), [&](const Tile& tile) { forward<T>(in, y, tile); });
  });
}

int64_t depthwise_gate_parts(const DepthwiseGate& in) { return tiling_of(in.size, in.g).parts(); }

void depthwise_gate_backward(const DepthwiseGate& in, const DepthwiseGateGradients& grad, void*) {
  with_type(in.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    const Tiling tiling = tiling_of(in.size, in.g);
    for_each_tile(tiling, [&](const Tile& tile) {
      const int64_t place = (tiling.part(tile) * in.size.channels + tile.c) * kSums;
      backward<T>(in, grad, tile, static_cast<Accumulate<T>*>(grad.partial) + place);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
