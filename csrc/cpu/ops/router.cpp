// The router's pool on the CPU: the sum of every plane over its pixels in parts, and its gradient. The decision is in
// router_decision.cpp.

#include "params/router.h"

#include "cpu/tile/tiling.h"

namespace seemore::SEEMORE_ISA {
namespace {

// Sums are of a row first, then of the rows, so that long ones keep their last digits.
template <class T>
void pool_tile(const SizedImage& a, const Tile& tile, Accumulate<T>* sums) {
  using A = Accumulate<T>;
  const int64_t width = tile.w1 - tile.w0, row_stride = round_up(width, kLanes<A>);
  if (a.image.column == 1 && tile.channels == 1) {
    Vec<A> total{};
    A rest = 0;
    for (int64_t h = tile.h0; h < tile.h1; ++h) {
      const T* const row = address<const T>(a.image, tile.b, tile.c, h, tile.w0);
      Vec<A> sum{};
      int64_t i = 0;
      for (; i + kLanes<A> <= width; i += kLanes<A>) sum += load(row + i);
      A few = 0;
      for (; i < width; ++i) few += load_one(row + i);
      total += sum, rest += few;
    }
    *sums = sum_of_lanes<A>(total) + static_cast<double>(rest);
    return;
  }
  Rows<A> row(1, tile.channels * row_stride), total_rows(tile.channels, kLanes<A>);
  for (int64_t h = tile.h0; h < tile.h1; ++h) {
    load_rows<T>(row[0], a.image, a.size, {tile.b, tile.c, tile.channels, h, tile.w0, row_stride}, width);
    for (int64_t c = 0; c < tile.channels; ++c) {
      A* const total = total_rows[c];
      store(total, load(total) + row_sum(row[0] + c * row_stride, row_stride));
    }
  }
  for (int64_t c = 0; c < tile.channels; ++c) sums[c] = sum_of_lanes<A>(load(total_rows[c]));
}

template <class T>
void spread_tile(const SizedImage& da, const Tile& tile, const Accumulate<T>* dmean) {
  using A = Accumulate<T>;
  const int64_t width = tile.w1 - tile.w0, row_stride = round_up(width, kLanes<A>);
  const A pixels = static_cast<A>(da.size.height * da.size.width);
  Rows<A> row(1, tile.channels * row_stride);
  for (int64_t c = 0; c < tile.channels; ++c) {
    for (int64_t i = 0; i < row_stride; i += kLanes<A>)
      store(row[0] + c * row_stride + i, broadcast(dmean[c] / pixels));
  }
  for (int64_t h = tile.h0; h < tile.h1; ++h) {
    store_rows<T>(da.image, {tile.b, tile.c, tile.channels, h, tile.w0, row_stride}, row[0], width);
  }
}

}  // namespace

int64_t pool_parts(const SizedImage& a) { return tiling_of(a.size, a.image).parts_of_image(); }

void pool(const SizedImage& a, void* partial, void*) {
  const Tiling tiling = tiling_of(a.size, a.image);
  with_type(a.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    for_each_tile(tiling, [&](const Tile& tile) {
      const int64_t place = (tiling.part_of_image(tile) * a.size.batch + tile.b) * a.size.channels + tile.c;
      pool_tile<T>(a, tile, static_cast<Accumulate<T>*>(partial) + place);
    });
  });
}

void spread(const SizedImage& da, const void* dmean, void*) {
  with_type(da.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    for_each_tile(tiling_of(da.size, da.image), [&](const Tile& tile) {
      const int64_t place = tile.b * da.size.channels + tile.c;
      spread_tile<T>(da, tile, static_cast<const Accumulate<T>*>(dmean) + place);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
