// Blocks of pixels with all their channels, and parameters, as the trained layers read and write them.
//
// A block has one row for each channel, `row_stride` elements from one to the next, a multiple of a vector. Padding
// beyond the pixels is finite, and zero where it is summed over.
#pragma once

#include "cpu/tile/prefetch.h"
#include "cpu/tile/tiling.h"
#include "params/layer_types.h"

namespace seemore::SEEMORE_ISA {

// The stride of rows of so many pixels: an odd number of cache lines, so that channels do not share a few sets of the
// first cache.
inline int64_t row_stride_for(int64_t pixels) { return (round_up(pixels, 16) / 16 | 1) * 16; }

// Call body(data) with a parameter's elements, of its type.
template <class Body>
inline auto with_elements(const Parameter& parameter, const Body& body) {
  switch (parameter.dtype) {
    case DType::float32:
      return body(static_cast<float*>(parameter.data));
    case DType::float64:
      return body(static_cast<double*>(parameter.data));
    default:
      return body(static_cast<BFloat16*>(parameter.data));
  }
}

// Element i of a parameter, and its gradient.
template <class A>
inline A value_of(const Parameter& parameter, int64_t i) {
  return with_elements(parameter, [=](const auto* data) { return static_cast<A>(load_one(data + i)); });
}

inline void set_value(const Parameter& parameter, int64_t i, double value) {
  with_elements(parameter, [=](auto* data) { store_one(data + i, static_cast<decltype(load_one(data))>(value)); });
}

// A whole parameter in the accumulation type, and its gradient.
template <class A>
inline void read_values(A* to, const Parameter& parameter, int64_t count) {
  with_elements(parameter, [=](const auto* data) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(load_one(data + i));
  });
}

template <class A>
inline void write_values(const Parameter& parameter, const A* from, int64_t count) {
  with_elements(parameter, [=](auto* data) {
    for (int64_t i = 0; i < count; ++i) store_one(data + i, static_cast<decltype(load_one(data))>(from[i]));
  });
}

// load_rows and store_rows of images of any type; if one is double, all are.

inline void load_image(float* out, const TypedImage& image, const Size& size, const Place& place, int64_t count) {
  if (image.dtype == DType::float32) return load_rows<float>(out, image.view, size, place, count);
  load_rows<BFloat16>(out, image.view, size, place, count);
}

inline void load_image(double* out, const TypedImage& image, const Size& size, const Place& place, int64_t count) {
  load_rows<double>(out, image.view, size, place, count);
}

inline void store_image(const TypedImage& image, const Place& place, float* rows, int64_t count) {
  if (image.dtype == DType::float32) return store_rows<float>(image.view, place, rows, count);
  store_rows<BFloat16>(image.view, place, rows, count);
}

inline void store_image(const TypedImage& image, const Place& place, double* rows, int64_t count) {
  store_rows<double>(image.view, place, rows, count);
}

// The cut of images into blocks of at most `most` pixels, one after another: of a row, or of the whole image if the
// rows of all the images are adjacent. Blocks depend on sizes and strides alone, so that sums do not depend on threads.
struct Blocks {
  template <class... Images>
  Blocks(int64_t most, const Size& whole, const Images&... images) : size(whole), most(most) {
    if ((are_rows_adjacent(whole, images.view) && ...)) size.height = 1, size.width = whole.height * whole.width;
    of_a_row = (size.width + most - 1) / most;
  }
  static bool are_rows_adjacent(const Size& size, const Image& image) {
    return !image.data || size.height == 1 || image.row == size.width * image.column;
  }
  int64_t count() const { return size.batch * size.height * of_a_row; }
  int64_t row_stride() const { return row_stride_for(smaller(most, size.width)); }
  Place place(int64_t block, int64_t channels, int64_t row_stride) const {
    const int64_t row = block / of_a_row;
    return {row / size.height, 0, channels, row % size.height, block % of_a_row * most, row_stride};
  }
  int64_t width(int64_t block) const { return smaller(most, size.width - block % of_a_row * most); }
  // Prefetch an image's pixels of a block before `end` while a product computes `rows` rows of `width` pixels.
  Prefetcher prefetch(const TypedImage& image, int64_t block, int64_t end, int64_t channels, int64_t rows,
                      int64_t width) const {
    if (block >= end) return {};
    return {image, place(block, channels, 0), this->width(block), rows, width};
  }

  Size size;
  int64_t most, of_a_row;
};

}  // namespace seemore::SEEMORE_ISA
