// calibrate's forward on the CPU: k + bilinear(pointwise(depthwise_3x3(aggregations of k))).
//
// k is read twice, once to be gathered and once to be added to. Everything between is small: maps of 1 / 16 of the
// image and less.

#include "params/calibrate.h"

#include "cpu/ops/calibrate_maps.h"

namespace seemore::SEEMORE_ISA {
namespace {

// Rows [tile.h0, tile.h1) of the first aggregation.
template <class T, class A = Accumulate<T>>
void aggregate_tile(const Calibrate& in, const CalibrateParameters<T>& parameters, const Tile& tile, Map<A> one,
                    Rows<A>& buffers) {
  const int64_t width = 4 * one.width, row_stride = round_up(width, kLanes<A>);
  A* const sums = buffers[1];
  for (int64_t y = tile.h0; y < tile.h1; ++y) {
    for (int64_t i = 0; i < 4; ++i) {
      const Place place{tile.b, tile.c, tile.channels, 4 * y + i, 0, row_stride};
      const A* const k = read_rows<T>(buffers[0], in.k, in.size, place, width);
      for (int64_t c = 0; c < tile.channels; ++c) {
        for (int64_t x = 0; x < row_stride; x += kLanes<A>) {
          const Vec<A> product = parameters.aggregate(tile.c + c, i, x) * load(k + c * row_stride + x);
          store(sums + c * row_stride + x, i == 0 ? product : load(sums + c * row_stride + x) + product);
        }
      }
    }
    for (int64_t c = 0; c < tile.channels; ++c) {
      A* const to = one.plane(tile.b, tile.c + c) + y * one.width;
      add_fourfold(to, sums + c * row_stride, parameters.bias_agg[tile.c + c], one.width);
    }
  }
}

// The further aggregations of a plane, and GELU of the last one.
template <class T, class A = Accumulate<T>>
void aggregate_again(const Calibrate& in, const CalibrateParameters<T>& parameters, void* maps, int64_t b, int64_t c) {
  const Map<A> one = level_of<A>(in, maps, 1);
  const int64_t row_stride = round_up(one.width, kLanes<A>);
  Rows<A> seen_row(1, row_stride), sum_row(1, row_stride);
  A *const seen = seen_row[0], *const sums = sum_row[0];
  for (int64_t level = 2; level <= in.recursive; ++level) {
    const Map<A> from = level_of<A>(in, maps, level - 1), to = level_of<A>(in, maps, level);
    for (int64_t y = 0; y < to.height; ++y) {
      for (int64_t i = 0; i < 4; ++i) {
        gelu_row(seen, from.plane(b, c) + (4 * y + i) * from.width, from.width);
        for (int64_t x = 0; x < from.width; x += kLanes<A>) {
          const Vec<A> product = parameters.aggregate(c, i, x) * load(seen + x);
          store(sums + x, i == 0 ? product : load(sums + x) + product);
        }
      }
      add_fourfold(to.plane(b, c) + y * to.width, sums, parameters.bias_agg[c], to.width);
    }
  }
  const Map<A> last = level_of<A>(in, maps, in.recursive), activated = level_of<A>(in, maps, in.recursive + 1);
  gelu_row(activated.plane(b, c), last.plane(b, c), last.pixels());
}

// Rows [first, last) of an image's small map: depthwise 3x3 and the C x C matrix.
template <class T, class A = Accumulate<T>>
void mix(const CalibrateParameters<T>& parameters, Map<const A> activated, Map<A> mixed, int64_t b, int64_t first,
         int64_t last) {
  const int64_t pixels = (last - first) * activated.width, row_stride = round_up(pixels, kLanes<A>);
  Buffer<A> seen(9 * row_stride), depth(parameters.channels * row_stride), result(parameters.rows * row_stride);
  for (int64_t c = 0; c < parameters.channels; ++c) {
    gather_taps<A>(seen, row_stride, activated.plane(b, c), activated.height, activated.width, first, last);
    depthwise<1, A>(depth + c * row_stride, seen, row_stride, parameters.dw + c * 9, parameters.bias_dw[c], row_stride);
  }
  multiply_rows<A>(result, depth, row_stride, parameters.pw, parameters.bias_pw, parameters.rows, parameters.channels,
                   row_stride);
  for (int64_t c = 0; c < parameters.channels; ++c) {
    std::memcpy(mixed.plane(b, c) + first * mixed.width, result + c * row_stride, pixels * sizeof(A));
  }
}

// y = k + the small map, stretched; rows of the map are interpolated to all columns first, the last two are kept.
template <class T, class A = Accumulate<T>>
void add_stretched(const Calibrate& in, const Image& y, const Tile& tile, Map<const A> mixed, const Axis<A>& rows,
                   const Axis<A>& columns, Rows<A>& buffers) {
  const int64_t width = in.size.width, row_stride = round_up(width, kLanes<A>);
  int64_t kept[2] = {-1, -1};
  const auto stretch = [&](int64_t row) {
    A* const to = buffers[2 + row % 2];
    if (kept[row % 2] == row) return to;
    kept[row % 2] = row;
    for (int64_t c = 0; c < tile.channels; ++c) {
      const A* const from = mixed.plane(tile.b, tile.c + c) + row * mixed.width;
      for (int64_t x = 0; x < width; ++x) {
        const A share = columns.share[x];
        to[c * row_stride + x] = (1 - share) * from[columns.before[x]] + share * from[columns.after[x]];
      }
    }
    return to;
  };
  for (int64_t h = tile.h0; h < tile.h1; ++h) {
    const A *const above = stretch(rows.before[h]), *const below = stretch(rows.after[h]);
    const Place place{tile.b, tile.c, tile.channels, h, 0, row_stride};
    const A* const k = read_rows<T>(buffers[0], in.k, in.size, place, width);
    const A share = rows.share[h], rest = 1 - share;
    store_rows<T>(y, place, buffers[1], width,
                  [=](Vec<A>, int64_t i) { return load(k + i) + (rest * load(above + i) + share * load(below + i)); });
  }
}

}  // namespace

void calibrate(const Calibrate& in, const Image& y, void* maps, void* small, void*) {
  if (in.size.batch == 0 || in.size.channels == 0) return;
  with_type(in.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    using A = Accumulate<T>;
    const CalibrateParameters<T> parameters(in);
    const Map<A> one = level_of<A>(in, maps, 1), activated = level_of<A>(in, maps, in.recursive + 1);
    for_each_calibrated<A>(calibrate_tiling(in, one.height), 2, [&](const Tile& tile, Rows<A>& buffers) {
      aggregate_tile<T>(in, parameters, tile, one, buffers);
    });
    for_each_task(in.size.batch * in.size.channels, [&](int64_t i) {
      aggregate_again<T>(in, parameters, maps, i / in.size.channels, i % in.size.channels);
    });
    const MixParts parts(in);
    const Map<A> mixed{static_cast<A*>(small), activated.batch, activated.height, activated.width};
    for_each_task(parts.count(), [&](int64_t i) {
      const int64_t first = i % parts.bands * parts.rows, last = smaller(first + parts.rows, parts.height);
      mix<T, A>(parameters, {activated.data, activated.batch, activated.height, activated.width}, mixed,
                i / parts.bands, first, last);
    });
    const Axis<A> rows(in.size.height, mixed.height), columns(in.size.width, mixed.width);
    for_each_calibrated<A>(calibrate_tiling(in, in.size.height), 4, [&](const Tile& tile, Rows<A>& buffers) {
      add_stretched<T, A>(in, y, tile, {mixed.data, mixed.batch, mixed.height, mixed.width}, rows, columns, buffers);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
