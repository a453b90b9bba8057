// Tiles of images, one task each; loops on threads; dispatch by dtype.
#pragma once

#include "cpu/tile/parallel.h"
#include "cpu/tile/rows.h"

namespace seemore::SEEMORE_ISA {

// Call task(begin, end) for ranges of tasks, on torch's threads: buffers that it allocates serve a whole range.
template <class Task>
inline void for_each_range(int64_t count, const Task& task) {
  parallel_for(
      count, [](const void* pointer, int64_t begin, int64_t end) { (*static_cast<const Task*>(pointer))(begin, end); },
      &task);
}

// Call task(i) for every i < count.
template <class Task>
inline void for_each_task(int64_t count, const Task& task) {
  for_each_range(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// Call run(T*) for the type of the images.
template <class Run>
inline void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32:
      return run(static_cast<float*>(nullptr));
    case DType::float64:
      return run(static_cast<double*>(nullptr));
    default:
      return run(static_cast<BFloat16*>(nullptr));
  }
}

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
  int64_t parts_of_image() const { return bands * columns; }
  int64_t parts() const { return size.batch * parts_of_image(); }
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
  int64_t widest() const { return smaller(width, size.width); }
  int64_t part_of_image(const Tile& tile) const { return tile.h0 / height * columns + tile.w0 / width; }
  int64_t part(const Tile& tile) const { return tile.b * parts_of_image() + part_of_image(tile); }

  Size size;
  int64_t channels, blocks, bands, height, columns, width;
};

// Rows [first, last), counted from some row.
struct RowRange {
  int64_t first, last;
};

// Of `count` rows from `row` on, those in [begin, end).
inline RowRange needed_of(int64_t row, int64_t count, int64_t begin, int64_t end) {
  const int64_t first = smaller(larger(begin - row, 0), count);
  return {first, larger(first, smaller(end - row, count))};
}

inline bool is_interleaved(const Image& image) { return image.column != 1 && image.channel == 1; }

inline Tiling tiling_of(const Size& size, const Image& image) {
  return is_interleaved(image) ? Tiling(size, smaller(larger(1, size.channels), 64), 64) : Tiling(size, 1, 1024);
}

// Call task(tile, buffers) for all tiles; make() returns the buffers of a range of them.
template <class Make, class Task>
inline void for_each_tile(const Tiling& tiling, const Make& make, const Task& task) {
  for_each_range(tiling.count(), [&](int64_t begin, int64_t end) {
    auto buffers = make();
    for (int64_t i = begin; i < end; ++i) task(tiling[i], buffers);
  });
}

template <class Task>
inline void for_each_tile(const Tiling& tiling, const Task& task) {
  for_each_task(tiling.count(), [&](int64_t i) { task(tiling[i]); });
}

}  // namespace seemore::SEEMORE_ISA
