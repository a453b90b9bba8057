// Sliding slabs of image rows, which pass through the stages of an operator, backward as forward: nothing is computed
// twice, and a stage finds the output of the one before in the cache.
//
// A slab has one long row for each channel: image row after image row, with a zero between them. So the nine taps of a
// 3x3 kernel lie at fixed distances for all pixels, and a stage works on any number of image rows as on one long row.
// All slabs of an operator hold the same image rows at the same place; after each step the last few move to the front.
#pragma once

#include "cpu/tile/blocks.h"

namespace seemore::SEEMORE_ISA {

// The image rows that the slabs hold: from `base` on, of which the first `kept` are of the step before.
struct SlabWindow {
  SlabWindow(int64_t width, int64_t kept, int64_t pixels)
      : width(width), padded_width(width + 1), kept(kept), step(round_up(larger(1, pixels / (width + 1)), 2)) {}

  int64_t offset_of(int64_t row) const { return (row - base) * padded_width; }

  int64_t width, padded_width, kept, step;
  int64_t base = 0;
};

template <class A>
class Slab {
 public:
  Slab(const SlabWindow& window, int64_t channels)
      : window_(window),
        channels_(channels),
        rows_(channels,
              row_stride_for(kFront + (window.kept + window.step + 3) * window.padded_width + 4 * kLanes<A>)) {}

  int64_t row_stride() const { return rows_.row_stride(); }
  A* address(int64_t row, int64_t channel = 0) const { return rows_[channel] + kFront + window_.offset_of(row); }

  void clear() { std::memset(rows_, 0, channels_ * row_stride() * sizeof(A)); }
  void clear_row(int64_t row) const {
    for (int64_t c = 0; c < channels_; ++c) std::memset(address(row, c), 0, window_.padded_width * sizeof(A));
  }
  // Write the zeros between rows [first, last).
  void clear_gaps(int64_t first, int64_t last) {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t row = first; row < last; ++row) address(row, c)[window_.width] = 0;
    }
  }
  // Clear a vector behind row last - 1.
  void clear_behind(int64_t last) {
    for (int64_t c = 0; c < channels_; ++c) store(address(last, c), Vec<A>{});
  }

  // Move the `kept` rows before row `to` to the front; the caller then moves `window.base`.
  void slide(int64_t to) {
    for (int64_t c = 0; c < channels_; ++c) {
      std::memmove(address(window_.base, c), address(to - window_.kept, c),
                   window_.kept * window_.padded_width * sizeof(A));
    }
  }

  // Prefetch the rows to be loaded next while a product makes `rows` rows of `width` pixels.
  Prefetcher prefetch(const TypedImage& image, const Size& size, int64_t b, int64_t first, int64_t last, int64_t rows,
                      int64_t width) const {
    last = smaller(last, size.height);
    if (first >= last || image.view.row != size.width) return {};
    return {image, {b, 0, channels_, first, 0, 0}, (last - first) * size.width, rows, width};
  }

  void load(const TypedImage& image, const Size& size, int64_t b, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      load_image(address(row), image, size, {b, 0, channels_, row, 0, row_stride()}, window_.width);
    }
  }
  void save(const TypedImage& image, int64_t b, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      store_image(image, {b, 0, channels_, row, 0, row_stride()}, address(row), window_.width);
    }
  }

 private:
  static constexpr int64_t kFront = 64;  // elements before the first row, within reach of taps

  const SlabWindow& window_;
  int64_t channels_;
  Block<A> rows_;
};

// The images cut into bands of rows, one task each, so that small batches keep all cores busy. Bands depend on sizes
// alone, so that sums do not depend on the number of threads.
struct Bands {
  explicit Bands(const Size& size) : size(size) {
    constexpr int64_t tasks = 8, lowest = 24;
    of_image = larger(1, smaller(size.height / lowest, (tasks + size.batch - 1) / larger(1, size.batch)));
  }
  int64_t count() const { return size.batch * of_image; }
  int64_t image(int64_t band) const { return band / of_image; }
  int64_t top(int64_t band) const { return band % of_image * size.height / of_image; }
  int64_t bottom(int64_t band) const { return (band % of_image + 1) * size.height / of_image; }

  Size size;
  int64_t of_image;
};

// The rows of a band that a stage has computed so far, step by step.
struct BandStage {
  // Of the band and a halo above and below, as far as the image has one.
  BandStage(const Bands& bands, int64_t band, int64_t halo)
      : first(larger(0, bands.top(band) - halo)),
        last(smaller(bands.size.height, bands.bottom(band) + halo)),
        begin(first),
        end(first) {}

  // Go on to the last row where `source` has ended, else to `lag` rows behind it, by a multiple of so many.
  void follow(const BandStage& source, int64_t lag, int64_t multiple = 1) {
    begin = end;
    const int64_t reached = source.end == source.last ? last : smaller(last, source.end - lag);
    end = reached == last ? last : begin + larger(0, reached - begin) / multiple * multiple;
  }
  int64_t rows() const { return end - begin; }

  int64_t first, last, begin, end;
};

// Call body(distance of the tap, Constant<tap>) for the nine taps of a 3x3 kernel.
template <int tap = 0, class Body>
inline void each_of_nine(int64_t padded_width, const Body& body) {
  if constexpr (tap < 9) {
    body((tap / 3 - 1) * padded_width + tap % 3 - 1, Constant<tap>());
    each_of_nine<tap + 1>(padded_width, body);
  }
}

}  // namespace seemore::SEEMORE_ISA
