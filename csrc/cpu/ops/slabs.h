// Lines of an image that slide through the stages of an operator, backward as forward: nothing is computed twice, and
// what a stage needs of the one before is still in the cache.
//
// A slab has a row for each channel: line after line, with a zero between them. So what the taps of a 3x3 kernel see of
// all pixels lies at nine fixed distances, and a stage works on any number of lines as on one long row. All slabs of an
// operator hold the same lines at the same place; after each step the last few lines move to the front.
#pragma once

#include "cpu/tile/blocks.h"

namespace seemore::SEEMORE_ISA {

// Which lines the slabs hold: from `base` on, `kept` of them of the step before.
struct Held {
  Held(int64_t width, int64_t kept, int64_t pixels)
      : width(width), pitch(width + 1), kept(kept), step(round_up(larger(1, pixels / (width + 1)), 2)) {}

  int64_t at(int64_t line) const { return (line - base) * pitch; }

  int64_t width, pitch, kept, step;
  int64_t base = 0;
};

template <class A>
class Slab {
 public:
  Slab(const Held& held, int64_t channels)
      : held_(held),
        channels_(channels),
        rows_(channels, span_for(kFront + (held.kept + held.step + 3) * held.pitch + 4 * kLanes<A>)) {}

  int64_t span() const { return rows_.span(); }
  A* at(int64_t line, int64_t channel = 0) const { return rows_[channel] + kFront + held_.at(line); }

  void clear() { std::memset(rows_, 0, channels_ * span() * sizeof(A)); }
  void clear_line(int64_t line) const {
    for (int64_t c = 0; c < channels_; ++c) std::memset(at(line, c), 0, held_.pitch * sizeof(A));
  }
  // The zeros between lines [first, last).
  void clear_gaps(int64_t first, int64_t last) {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t line = first; line < last; ++line) at(line, c)[held_.width] = 0;
    }
  }
  // What lies behind line last - 1, as far as a vector reaches.
  void clear_behind(int64_t last) {
    for (int64_t c = 0; c < channels_; ++c) store(at(last, c), Vec<A>{});
  }

  // The `kept` lines that are held before line `to` move to the front; `held.base` is to follow.
  void slide(int64_t to) {
    for (int64_t c = 0; c < channels_; ++c) {
      std::memmove(at(held_.base, c), at(to - held_.kept, c), held_.kept * held_.pitch * sizeof(A));
    }
  }

  // The lines that will be loaded, asked for while a product makes `rows` rows of `width` pixels.
  Ahead ahead(const TypedImage& image, const Size& size, int64_t b, int64_t first, int64_t last, int64_t rows,
              int64_t width) const {
    last = smaller(last, size.height);
    if (first >= last || image.view.row != size.width) return {};
    return {image, {b, 0, channels_, first, 0, 0}, (last - first) * size.width, rows, width};
  }

  void load(const TypedImage& image, const Size& size, int64_t b, int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) {
      load_image(at(line), image, size, {b, 0, channels_, line, 0, span()}, held_.width);
    }
  }
  void save(const TypedImage& image, int64_t b, int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) {
      store_image(image, {b, 0, channels_, line, 0, span()}, at(line), held_.width);
    }
  }

 private:
  static constexpr int64_t kFront = 64;  // elements that taps may look at before the first line

  const Held& held_;
  int64_t channels_;
  Block<A> rows_;
};

// The images cut into bands of lines, one task each: as many of them as there are cores to wait for, for small batches.
// They depend on sizes alone, so that sums do not depend on the number of threads.
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

// The lines that a stage makes of a band, in steps: as far as the stage before has come.
struct Stage {
  // Of the band and `around` lines above and below, as far as the image has them.
  Stage(const Bands& bands, int64_t band, int64_t around)
      : first(larger(0, bands.top(band) - around)),
        last(smaller(bands.size.height, bands.bottom(band) + around)),
        begin(first),
        end(first) {}

  // The next lines: up to the last where `source` is through, else `lag` lines behind it, a multiple of so many.
  void follow(const Stage& source, int64_t lag, int64_t multiple = 1) {
    begin = end;
    const int64_t there = source.end == source.last ? last : smaller(last, source.end - lag);
    end = there == last ? last : begin + larger(0, there - begin) / multiple * multiple;
  }
  int64_t lines() const { return end - begin; }

  int64_t first, last, begin, end;
};

// body(taps' distance, Constant<tap>) for the nine taps of a 3x3 kernel
template <int tap = 0, class Body>
inline void each_of_nine(int64_t pitch, const Body& body) {
  if constexpr (tap < 9) {
    body((tap / 3 - 1) * pitch + tap % 3 - 1, Constant<tap>());
    each_of_nine<tap + 1>(pitch, body);
  }
}

}  // namespace seemore::SEEMORE_ISA
