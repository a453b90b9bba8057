// Parts of calibrate's forward and backward on the CPU: parameters in the accumulation type, small maps, bilinear
// positions, 4x4 blocks of a row, 3x3 neighbourhoods, and the product with a C x C matrix.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/tile/bilinear.h"
#include "cpu/tile/tiling.h"
#include "params/calibrate.h"

namespace seemore::SEEMORE_ISA {

constexpr int64_t kRowsAtOnce = 4;  // of the C x C matrix

// 4x4 weights of stride 4 along a row: vectors of pixels meet the columns of the weights in turn, a whole number of
// them each, or a part.
template <class A>
constexpr int64_t kPhases = kLanes<A> < 4 ? 4 / kLanes<A> : 1;

// All parameters of a call in the accumulation type A. Matrices have rows of zeros up to a multiple of kRowsAtOnce.
template <class T, class A = Accumulate<T>>
struct CalibrateParameters {
  explicit CalibrateParameters(const Calibrate& in)
      : channels(in.size.channels),
        rows(round_up(channels, kRowsAtOnce)),
        agg(channels * 4 * kRepeated),
        dw(channels * 9),
        pw(rows * channels),
        pw_transposed(rows * channels),
        bias_agg(channels),
        bias_dw(channels),
        bias_pw(rows) {
    const auto* weight = static_cast<const T*>(in.weight_agg);
    for (int64_t i = 0; i < channels * 4; ++i) {
      for (int64_t j = 0; j < kRepeated; ++j) agg[i * kRepeated + j] = load_one(weight + i * 4 + j % 4);
    }
    copy(dw, in.weight_dw, channels * 9);
    copy(bias_agg, in.bias_agg, channels);
    copy(bias_dw, in.bias_dw, channels);
    copy(bias_pw, in.bias_pw, channels);
    copy(pw, in.weight_pw, channels * channels);
    for (int64_t i = channels; i < rows; ++i) {
      bias_pw[i] = 0;
      for (int64_t j = 0; j < channels; ++j) pw[i * channels + j] = pw_transposed[i * channels + j] = 0;
    }
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < channels; ++j) pw_transposed[j * channels + i] = pw[i * channels + j];
    }
  }

  // Row i of channel c's 4x4 weights, as a vector at column x of an image meets them.
  Vec<A> aggregate(int64_t c, int64_t i, int64_t x) const {
    return load(agg + (c * 4 + i) * kRepeated + (kPhases<A> > 1 ? x % 4 : 0));
  }

  int64_t channels, rows;

 private:
  static constexpr int64_t kRepeated = larger(4, kLanes<A>);
  static void copy(A* to, const void* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_one(static_cast<const T*>(from) + i);
  }
  Buffer<A> agg;

 public:
  Buffer<A> dw, pw, pw_transposed, bias_agg, bias_dw, bias_pw;
};

// A small map, (C, B, height, width).
template <class A>
struct Map {
  A* data;
  int64_t batch, height, width;

  int64_t pixels() const { return height * width; }
  A* plane(int64_t b, int64_t c) const { return data + (c * batch + b) * pixels(); }
};

template <class A>
inline Map<A> map_of(const MapSize& size, A* data) {
  return {data, size.batch, size.height, size.width};
}

// level_size() in this namespace, which may not use inline functions of another.
inline MapSize size_of_level(const Calibrate& in, int64_t level) {
  const int64_t drop = 2 * in.recursive, keep = 2 * (in.recursive - level);
  return {in.size.channels, in.size.batch, in.size.height >> drop << keep, in.size.width >> drop << keep};
}

inline int64_t elements_of_level(const Calibrate& in, int64_t level) {
  const MapSize size = size_of_level(in, level);
  return size.channels * size.batch * size.height * size.width;
}

// Aggregation number `level` before GELU, or, for recursive + 1, the last one after it.
template <class A, class Data>
inline Map<A> level_of(const Calibrate& in, Data* maps, int64_t level) {
  int64_t offset = 0;
  for (int64_t below = 1; below < level; ++below) offset += elements_of_level(in, below);
  return map_of(size_of_level(in, smaller(level, in.recursive)), static_cast<A*>(maps) + offset);
}

// Positions of bilinear interpolation along one axis, as in torch's upsample_bilinear2d, align_corners=False.
template <class A>
struct Axis {
  Axis(int64_t pixels, int64_t small)
      : pixels(pixels), before(pixels), after(pixels), share(pixels), starts(small + 1) {
    int64_t reached = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      const BilinearPosition position(i, pixels, small);
      before[i] = static_cast<int32_t>(position.before);
      after[i] = static_cast<int32_t>(position.after);
      share[i] = static_cast<A>(position.share);
      while (reached <= before[i]) starts[reached++] = i;
    }
    while (reached <= small) starts[reached++] = pixels;
  }

  int64_t pixels;
  Buffer<int32_t> before, after;
  Buffer<A> share;         // of `after`
  Buffer<int64_t> starts;  // the first pixel with `before` at least [i]
};

// Pixels [0, count) of a place, in memory where they lie as they are needed, else as a copy; vectors beyond `count` can
// be read.
template <class T, class A = Accumulate<T>>
inline const A* read_rows(A* copy, const Image& image, const Size& size, const Place& place, int64_t count) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (image.column == 1 && place.channels == 1 && count % kLanes<A> == 0 && place.w + count <= size.width) {
      return address<const A>(image, place.b, place.c, place.h, place.w);
    }
  }
  load_rows<T>(copy, image, size, place, count);
  return copy;
}

// to[4 x + j] = from[x] for j < 4
template <class A>
inline void repeat_fourfold(A* to, const A* from, int64_t count) {
  for (int64_t x = 0; x < count; ++x) {
    for (int64_t j = 0; j < 4; ++j) to[4 * x + j] = from[x];
  }
}

// to[x] = bias + sum of from[4 x + j], j < 4
template <class A>
inline void add_fourfold(A* to, const A* from, A bias, int64_t count) {
  for (int64_t x = 0; x < count; ++x) {
    to[x] = bias + ((from[4 * x] + from[4 * x + 1]) + (from[4 * x + 2] + from[4 * x + 3]));
  }
}

// to = gelu(from); rows need not be whole vectors.
template <class A>
inline void gelu_row(A* to, const A* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, gelu<A>(load(from + i)));
  if (i == count) return;
  A last[kLanes<A>] = {};
  for (int64_t j = 0; i + j < count; ++j) last[j] = from[i + j];
  store(last, gelu<A>(load(last)));
  for (int64_t j = 0; i + j < count; ++j) to[i + j] = last[j];
}

// Gather the inputs of the nine taps for rows [first, last) of a plane: seen[tap * stride + pixel], 0 outside. Up to a
// whole vector, pixels beyond are 0, too.
template <class A>
inline void gather_taps(A* seen, int64_t stride, const A* plane, int64_t height, int64_t width, int64_t first,
                        int64_t last) {
  for (int64_t tap = 0; tap < 9; ++tap) {
    A* to = seen + tap * stride;
    const int64_t shift = tap % 3 - 1;
    const int64_t begin = shift < 0 ? 1 : 0, end = larger(begin, shift > 0 ? width - 1 : width);
    for (int64_t row = first; row < last; ++row, to += width) {
      const int64_t from = row + tap / 3 - 1;
      if (from < 0 || from >= height) {
        for (int64_t x = 0; x < width; ++x) to[x] = 0;
        continue;
      }
      if (begin > 0) to[0] = 0;
      if (shift > 0) to[width - 1] = 0;
      const A* const row_of_plane = plane + from * width + shift;
      for (int64_t x = begin; x < end; ++x) to[x] = row_of_plane[x];
    }
    for (A* const behind = seen + tap * stride + round_up((last - first) * width, kLanes<A>); to < behind; ++to)
      *to = 0;
  }
}

// to[i] = bias + sum over taps of weight[tap] * seen[tap][i], or, with kStep = -1, weight[8 - tap]
template <int kStep, class A>
inline void depthwise(A* to, const A* seen, int64_t stride, const A* weight, A bias, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    Vec<A> sum = broadcast(bias);
    for (int tap = 0; tap < 9; ++tap) sum += weight[kStep > 0 ? tap : 8 - tap] * load(seen + tap * stride + i);
    store(to + i, sum);
  }
}

// to[row] = bias[row] + sum over channels of matrix[row][channel] * from[channel], for a multiple of kRowsAtOnce rows
// and `count` pixels, up to whole vectors. Without bias: 0.
template <int V, class A>
inline void multiply_columns(A* to, const A* from, int64_t stride, const A* matrix, const A* bias, int64_t rows,
                             int64_t channels) {
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    Vec<A> sum[kRowsAtOnce][V];
    for (int r = 0; r < kRowsAtOnce; ++r) {
      for (int v = 0; v < V; ++v) sum[r][v] = broadcast(bias ? bias[row + r] : A(0));
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
      Vec<A> x[V];
      for (int v = 0; v < V; ++v) x[v] = load(from + channel * stride + v * kLanes<A>);
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const A weight = matrix[(row + r) * channels + channel];
        for (int v = 0; v < V; ++v) sum[r][v] += weight * x[v];
      }
    }
    for (int r = 0; r < kRowsAtOnce; ++r) {
      for (int v = 0; v < V; ++v) store(to + (row + r) * stride + v * kLanes<A>, sum[r][v]);
    }
  }
}

template <class A>
inline void multiply_rows(A* to, const A* from, int64_t stride, const A* matrix, const A* bias, int64_t rows,
                          int64_t channels, int64_t count) {
  int64_t i = 0;
  for (; i + 4 * kLanes<A> <= count; i += 4 * kLanes<A>) {
    multiply_columns<4>(to + i, from + i, stride, matrix, bias, rows, channels);
  }
  for (; i < count; i += kLanes<A>) multiply_columns<1>(to + i, from + i, stride, matrix, bias, rows, channels);
}

// Tiles of an image, or of a map with so many rows; all columns together.
inline Tiling calibrate_tiling(const Calibrate& in, int64_t height) {
  const Size size{in.size.batch, in.size.channels, height, in.size.width};
  return Tiling(size, is_interleaved(in.k) ? smaller(larger(1, size.channels), 16) : 1, larger(1, size.width));
}

// Call task(tile, buffers) for all tiles, with `count` rows for all channels of a tile.
template <class A, class Task>
inline void for_each_calibrated(const Tiling& tiling, int64_t count, const Task& task) {
  const int64_t length = tiling.channels * round_up(tiling.size.width, kLanes<A>);
  for_each_tile(tiling, [&] { return Rows<A>(count, length); }, task);
}

// Bands of rows of the last map, of one image each, that fit the cache with all their channels.
struct MixParts {
  explicit MixParts(const Calibrate& in) {
    const MapSize last = size_of_level(in, in.recursive);
    batch = last.batch, height = last.height, width = last.width;
    constexpr int64_t most = 1024;  // pixels
    rows = larger(1, smaller(height, most / larger(1, width)));
    bands = rows > 0 ? (height + rows - 1) / rows : 0;
  }
  int64_t count() const { return batch * bands; }

  int64_t batch, height, width, rows, bands;
};

}  // namespace seemore::SEEMORE_ISA
