// depthwise_gate on the CPU: y = u * s, s = depthwise_3x3(g) + bias, in one sweep down the lines of a tile.
//
// Each step makes R lines of s out of R + 2 lines of g. Backward has a window of dc = dy * u, too, the gradient of s;
// both read every image once.

#include "depthwise_gate.h"

#include "stencils.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int R = 4;       // lines at once
constexpr int kSums = 10;  // of a channel: the gradients of nine weights and the bias

// Weights and bias of a tile's channels in the accumulation type, weights also backwards for the transposed stencil.
template <class T, class A = Accumulate<T>>
struct Parameters {
  Parameters(const DepthwiseGate& in, int64_t channels) : in(in), rows(3, channels * 9) {}

  void move(const Tile& tile) {
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

  const DepthwiseGate& in;
  Rows<A> rows;
};

// The place of a line among the last R + 2, for lines from -2 R on.
constexpr int64_t kKept = R + 2;
inline int64_t place_of(int64_t line) { return (line + 4 * kKept) % kKept; }

template <class T, class A = Accumulate<T>>
class Forward {
 public:
  Forward(const DepthwiseGate& in, const Image& y, const Tiling& tiling)
      : in_(in),
        y_(y),
        columns_(round_up(tiling.widest(), kLanes<A>)),
        parameters_(in, tiling.channels),
        g_(in.g, in.size, kKept, tiling.channels, columns_ + 2 * kLanes<A>),
        u_(in.u, in.size, 1, tiling.channels, columns_),
        s_(R, tiling.channels * columns_) {}

  void operator()(const Tile& tile) {
    const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>);
    parameters_.move(tile);
    g_.move(tile, tile.w0, width, kLanes<A>, false);
    u_.move(tile, tile.w0, width, 0, false);
    for (int64_t line = tile.h0 - 1; line <= tile.h0; ++line) g_.read(place_of(line), line);
    for (int64_t h = tile.h0; h < tile.h1; h += R) {
      for (int64_t line = h + 1; line <= h + R; ++line) g_.read(place_of(line), line);
      for (int64_t c = 0; c < tile.channels; ++c) {
        Line<A> lines[R + 2];
        for (int64_t j = 0; j < R + 2; ++j) lines[j] = g_.line(place_of(h - 1 + j), c);
        stencil_3x3<R>(lines, parameters_.taps(c), width, [&](int64_t i, const Vec<A>(&sums)[R]) {
          for (int r = 0; r < R; ++r) store(s_[r] + c * width + i, sums[r]);
        });
      }
      for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
        u_.read(0, h + r);
        const A* const u = u_.row(0, 0);
        store_rows<T>(y_, {tile.b, tile.c, tile.channels, h + r, tile.w0, width}, s_[r], tile.w1 - tile.w0,
                      [u](Vec<A> s, int64_t i) { return load(u + i) * s; });
      }
    }
  }

 private:
  const DepthwiseGate& in_;
  const Image& y_;
  int64_t columns_;
  Parameters<T> parameters_;
  LineReader<T> g_, u_;
  Rows<A> s_;
};

//   du = dy * s;  dc = dy * u;  dg = stencil transposed(dc);  dweight[k] = sum dc * what tap k sees of g
// Where the tile has neighbours on its lines, dc begins `halo` columns before it.
template <class T, class A = Accumulate<T>>
class Backward {
 public:
  Backward(const DepthwiseGate& in, const DepthwiseGateGradients& grad, const Tiling& tiling)
      : in_(in),
        grad_(grad),
        columns_(round_up(tiling.widest(), kLanes<A>) + 2 * kMargin),
        parameters_(in, tiling.channels),
        g_(in.g, in.size, kKept, tiling.channels, columns_),
        dy_(grad.dy, in.size, R, tiling.channels, columns_),
        u_(in.u, in.size, 1, tiling.channels, columns_),
        dc_(kKept, tiling.channels * columns_),
        results_(R, tiling.channels * columns_),
        sum_rows_(tiling.channels, kSums * kLanes<A>) {}

  void operator()(const Tile& tile, A* partial) {
    const int64_t width = round_up(tile.w1 - tile.w0, kLanes<A>), padded = width + 2 * kMargin;
    const int64_t halo = tile.w0 > 0 || tile.w1 < in_.size.width ? kMargin : 0, wide = width + 2 * halo;
    parameters_.move(tile);
    g_.move(tile, tile.w0, width, kMargin, false);
    dy_.move(tile, tile.w0 - halo, wide, 0, false);
    u_.move(tile, tile.w0 - halo, wide, 0, false);
    for (int64_t c = 0; c < tile.channels; ++c) std::memset(sum_rows_[c], 0, kSums * sizeof(Vec<A>));
    for (int64_t n = 0; n < kKept; ++n) std::memset(dc_[n], 0, tile.channels * padded * sizeof(A));

    // dc of line h + 1 + r, and what else that takes, which ends `R` lines behind the tile's first one
    for (int64_t h = tile.h0 - R; h < tile.h1; h += R) {
      for (int64_t line = larger(h + 2, tile.h0 - 1); line <= smaller(h + R + 1, tile.h1); ++line) {
        g_.read(place_of(line), line);
      }
      for (int64_t r = 0; r < R; ++r) make_dc(tile, r, h + 1 + r, wide, padded, halo);
      make_du(tile, h + 1, width, halo, padded);
      if (h < tile.h0) continue;
      for (int64_t c = 0; c < tile.channels; ++c) {
        Line<A> lines[R + 2];
        for (int64_t j = 0; j < R + 2; ++j) {
          const A* const row = dc_[place_of(h - 1 + j)] + c * padded + kMargin;
          lines[j] = {row, load(row - kLanes<A>), load(row + width)};
        }
        stencil_3x3<R>(lines, parameters_.backwards(c), width, [&](int64_t i, const Vec<A>(&sums)[R]) {
          for (int r = 0; r < R; ++r) store(results_[r] + c * width + i, sums[r]);
        });
      }
      for (int64_t r = 0; r < smaller(R, tile.h1 - h); ++r) {
        const Place place{tile.b, tile.c, tile.channels, h + r, tile.w0, width};
        store_rows<T>(grad_.dg, place, results_[r], tile.w1 - tile.w0);
      }
    }
    for (int64_t c = 0; c < tile.channels; ++c) {
      const auto* const sums = reinterpret_cast<const Vec<A>*>(sum_rows_[c]);
      for (int64_t i = 0; i < kSums; ++i) partial[c * kSums + i] = sum_of_lanes<A>(sums[i]);
    }
  }

 private:
  static constexpr int64_t kMargin = kLanes<A>;

  // Number r of R lines; 0 outside the image.
  void make_dc(const Tile& tile, int64_t r, int64_t line, int64_t wide, int64_t padded, int64_t halo) {
    A* const dc = dc_[place_of(line)] + kMargin - halo;
    const bool is_needed = line >= larger(tile.h0 - 1, 0) && line < smaller(tile.h1 + 1, in_.size.height);
    if (is_needed) dy_.read(r, line), u_.read(0, line);
    for (int64_t c = 0; c < tile.channels; ++c) {
      const A *const dy = is_needed ? dy_.row(r, c) : nullptr, *const u = is_needed ? u_.row(0, c) : nullptr;
      for (int64_t i = 0; i < wide; i += kLanes<A>) {
        store(dc + c * padded + i, is_needed ? load(dy + i) * load(u + i) : Vec<A>{});
      }
    }
  }

  // du and the weights' sums of R lines, as far as they are the tile's.
  void make_du(const Tile& tile, int64_t line, int64_t width, int64_t halo, int64_t padded) {
    const LineRange own = needed_of(line, R, tile.h0, tile.h1);
    for (int64_t c = 0; c < tile.channels; ++c) {
      Line<A> lines[R + 2];
      const A* dc[R];
      for (int64_t j = 0; j < R + 2; ++j) {
        const bool is_read = line - 1 + j >= tile.h0 - 1 && line - 1 + j <= tile.h1;
        lines[j] = g_.line(place_of(is_read ? line - 1 + j : tile.h0), c);  // else any: what is made of it is dropped
      }
      for (int64_t r = 0; r < R; ++r) dc[r] = dc_[place_of(line + r)] + c * padded + kMargin;
      stencil_3x3<R>(lines, parameters_.taps(c), width, [&](int64_t i, const Vec<A>(&sums)[R]) {
        for (int r = 0; r < R; ++r) store(results_[r] + c * width + i, sums[r]);
      });
      auto* const sums = reinterpret_cast<Vec<A>*>(sum_rows_[c]);
      if (own.first == 0 && own.last == R) {
        stencil_3x3_gradients<R>(sums, dc, lines, width);
        continue;
      }
      for (int64_t r = own.first; r < own.last; ++r) {
        const Line<A> around[3] = {lines[r], lines[r + 1], lines[r + 2]};
        stencil_3x3_gradients<1>(sums, dc + r, around, width);
      }
    }
    for (int64_t r = own.first; r < own.last; ++r) {
      const Place place{tile.b, tile.c, tile.channels, line + r, tile.w0, width};
      const A* const dy = dy_.row(r, 0) + halo;
      const int64_t apart = 2 * halo;  // more from one channel's dy to the next than of s
      store_rows<T>(grad_.du, place, results_[r], tile.w1 - tile.w0,
                    [=](Vec<A> s, int64_t i) { return load(dy + i + (apart ? i / width * apart : 0)) * s; });
    }
  }

  const DepthwiseGate& in_;
  const DepthwiseGateGradients& grad_;
  int64_t columns_;
  Parameters<T> parameters_;
  LineReader<T> g_, dy_, u_;
  Rows<A> dc_, results_, sum_rows_;  // dc_: the last R + 2 lines, each at its place
};

}  // namespace

void depthwise_gate(const DepthwiseGate& in, const Image& y, void*) {
  with_type(in.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    const Tiling tiling = tiling_of(in.size, in.g);
    const auto make = [&] { return Forward<T>(in, y, tiling); };
    for_each_tile(tiling, make, [](const Tile& tile, Forward<T>& forward) { forward(tile); });
  });
}

int64_t depthwise_gate_parts(const DepthwiseGate& in) { return tiling_of(in.size, in.g).parts(); }

void depthwise_gate_backward(const DepthwiseGate& in, const DepthwiseGateGradients& grad, void*) {
  with_type(in.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    const Tiling tiling = tiling_of(in.size, in.g);
    const auto make = [&] { return Backward<T>(in, grad, tiling); };
    for_each_tile(tiling, make, [&](const Tile& tile, Backward<T>& backward) {
      const int64_t place = (tiling.part(tile) * in.size.channels + tile.c) * kSums;
      backward(tile, static_cast<Accumulate<T>*>(grad.partial) + place);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
