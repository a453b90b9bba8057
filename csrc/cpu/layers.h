// What the trained layers share: LayerNorm, and products with weights.
//
// A block is some pixels of an image with all their channels, one row of `span` elements for each channel, a multiple
// of a vector. What lies beyond the pixels is finite, and zero in what is summed over.
#pragma once

#include "../layers.h"
#include "matrix.h"
#include "tiles.h"

namespace seemore::SEEMORE_ISA {

// From one channel's pixels to the next's: an odd number of cache lines, lest all channels lie in the same few sets of
// the first cache.
inline int64_t span_for(int64_t pixels) { return (round_up(pixels, 16) / 16 | 1) * 16; }

// A block's memory.
template <class A>
class Block {
 public:
  Block(int64_t channels, int64_t span) : span_(span), data_(channels * span) {
    std::memset(data_, 0, channels * span * sizeof(A));
  }
  int64_t span() const { return span_; }
  A* operator[](int64_t c) const { return data_ + c * span_; }
  operator A*() const { return data_; }

 private:
  int64_t span_;
  Buffer<A> data_;
};

// Element i of a parameter, and its gradient.
template <class A>
inline A value_of(const Parameter& parameter, int64_t i) {
  switch (parameter.dtype) {
    case DType::float32:
      return static_cast<const float*>(parameter.data)[i];
    case DType::float64:
      return static_cast<A>(static_cast<const double*>(parameter.data)[i]);
    default:
      return load_one(static_cast<const BFloat16*>(parameter.data) + i);
  }
}

inline void set_value(const Parameter& parameter, int64_t i, double value) {
  switch (parameter.dtype) {
    case DType::float32:
      static_cast<float*>(parameter.data)[i] = static_cast<float>(value);
      return;
    case DType::float64:
      static_cast<double*>(parameter.data)[i] = value;
      return;
    default:
      store_one(static_cast<BFloat16*>(parameter.data) + i, static_cast<float>(value));
  }
}

// A whole parameter in the type of sums, and its gradient.
template <class A>
inline void read_values(A* to, const Parameter& parameter, int64_t count) {
  switch (parameter.dtype) {
    case DType::float32:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<const float*>(parameter.data)[i];
      return;
    case DType::float64:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(static_cast<const double*>(parameter.data)[i]);
      return;
    default:
      for (int64_t i = 0; i < count; ++i) to[i] = load_one(static_cast<const BFloat16*>(parameter.data) + i);
  }
}

template <class A>
inline void write_values(const Parameter& parameter, const A* from, int64_t count) {
  switch (parameter.dtype) {
    case DType::float32:
      for (int64_t i = 0; i < count; ++i) static_cast<float*>(parameter.data)[i] = static_cast<float>(from[i]);
      return;
    case DType::float64:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(parameter.data)[i] = from[i];
      return;
    default:
      for (int64_t i = 0; i < count; ++i) {
        store_one(static_cast<BFloat16*>(parameter.data) + i, static_cast<float>(from[i]));
      }
  }
}

// load_rows and store_rows of images of any type; in double, all are.

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

// Asks for the memory of the pixels that come next, a little at a time, while there is work to do: the processor does
// not foresee that one channel follows on another.
class Ahead {
 public:
  Ahead() = default;
  // Of `count` pixels from `place` on that lie one after another, while a product makes `rows` rows of `width` pixels:
  // a call of `some` for each of its tiles.
  Ahead(const TypedImage& image, const Place& place, int64_t count, int64_t rows, int64_t width) {
    const int64_t calls = (rows + 5) / 6 * ((width + kTileVectors * kWidth - 1) / (kTileVectors * kWidth));
    const int64_t bytes = image.dtype == DType::float64 ? 8 : image.dtype == DType::float32 ? 4 : 2;
    const int64_t offset = place.b * image.view.batch + place.c * image.view.channel + place.h * image.view.row +
                           place.w * image.view.column;
    if (image.view.column != 1 || calls == 0) return;
    from_ = static_cast<const char*>(image.view.data) + offset * bytes;
    apart_ = image.view.channel * bytes, length_ = count * bytes, channels_ = place.channels;
    at_once_ = (channels_ * ((length_ + kLine - 1) / kLine) + calls - 1) / calls;
  }

  void some() {
    for (int64_t i = 0; i < at_once_ && channels_ > 0; ++i) {
      __builtin_prefetch(from_ + at_, 0, 2);
      at_ += kLine;
      if (at_ >= length_) at_ = 0, from_ += apart_, --channels_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes

  const char* from_ = nullptr;
  int64_t apart_ = 0, length_ = 0, channels_ = 0, at_once_ = 0, at_ = 0;
};

// The pixels of images in blocks of `most`, one after another: of a line, or of the whole image where in all of the
// images line follows on line. The blocks depend on sizes and strides alone, so that sums do not depend on threads.
struct Blocks {
  template <class... Images>
  Blocks(int64_t most, const Size& whole, const Images&... images) : size(whole), most(most) {
    if ((follow(whole, images.view) && ...)) size.height = 1, size.width = whole.height * whole.width;
    of_a_line = (size.width + most - 1) / most;
  }
  static bool follow(const Size& size, const Image& image) {
    return !image.data || size.height == 1 || image.row == size.width * image.column;
  }
  int64_t count() const { return size.batch * size.height * of_a_line; }
  int64_t span() const { return span_for(smaller(most, size.width)); }
  Place place(int64_t block, int64_t channels, int64_t span) const {
    const int64_t line = block / of_a_line;
    return {line / size.height, 0, channels, line % size.height, block % of_a_line * most, span};
  }
  int64_t width(int64_t block) const { return smaller(most, size.width - block % of_a_line * most); }
  // An image's pixels of a block before `end`, asked for while a product makes `rows` rows of `width` pixels.
  Ahead ahead(const TypedImage& image, int64_t block, int64_t end, int64_t channels, int64_t rows,
              int64_t width) const {
    if (block >= end) return {};
    return {image, place(block, channels, 0), this->width(block), rows, width};
  }

  Size size;
  int64_t most, of_a_line;
};

// sums[i] of `parts` rows of `count`, added up in their order.
template <class A>
inline void add_up(A* sums, const A* partial, int64_t parts, int64_t count) {
  for_each_range(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + i];
      sums[i] = static_cast<A>(sum);
    }
  });
}

// weight * x + bias, packed for `multiply`: rows of `weight` (rows, columns), or of it transposed. With cells that are
// Pairs x is rounded to bfloat16, a few vectors of pixels at a time. Factors of rows and columns are then exact beside
// weights that are: they are not rounded with them.
template <class A, class Cell = A>
class Weights {
 public:
  Weights(int64_t rows, int64_t columns)
      : matrix_{round_up(rows, 2), 1, cells_of<Cell>(columns), cells_of<Cell>(columns), nullptr, nullptr},
        weights_(matrix_.size()),
        bias_(matrix_.rows),
        of_row_(matrix_.rows),
        of_column_(columns),
        count_(rows),
        columns_(columns) {
    matrix_.weights = weights_, matrix_.bias = bias_;
    for (int64_t r = 0; r < matrix_.rows; ++r) bias_[r] = 0;
  }

  template <class Element>
  void pack(const Element& element) {
    const auto one = [](int64_t) { return A{1}; };
    pack(element, one, one);
  }

  // element(row, column) * of_row(row) * of_column(column)
  template <class Element, class OfRow, class OfColumn>
  void pack(const Element& element, const OfRow& of_row, const OfColumn& of_column) {
    for (int64_t r = 0; r < matrix_.rows; ++r) of_row_[r] = r < count_ ? of_row(r) : 0;
    for (int64_t c = 0; c < columns_; ++c) of_column_[c] = of_column(c);
    SEEMORE_ISA::pack(matrix_, count_, columns_, columns_, [&](int64_t r, int64_t, int64_t c) -> A {
      return kIsNarrow ? element(r, c) : element(r, c) * of_row_[r] * of_column_[c];
    });
  }
  A& bias(int64_t row) { return bias_[row]; }

  // finish(row, i, sums), as `multiply`, by whole vectors.
  template <class Finish>
  void operator()(const A* x, int64_t span, int64_t width, const Finish& finish) const {
    width = round_up(width, kLanes<A>);
    if constexpr (!kIsNarrow) {
      const Source<A> source{x, span};
      multiply(matrix_, &source, width, finish);
    } else {
      constexpr int64_t most = kTileVectors * kWidth;
      const Buffer<Cell> cells(matrix_.cells * most);
      const Source<Cell> source{cells, most};
      for (int64_t first = 0; first < width; first += most) {
        const int64_t count = smaller(most, width - first);
        narrow(cells, most, x + first, span, count);
        multiply(matrix_, &source, count, [&](int64_t row, int64_t i, const auto& sums) {
          constexpr int64_t R = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(sums[0][0]);
          Vec<A> scaled[R][V];
          for (int64_t r = 0; r < R; ++r) {
            for (int64_t v = 0; v < V; ++v) scaled[r][v] = sums[r][v] * of_row_[row + r];
          }
          finish(row, first + i, scaled);
        });
      }
    }
  }

  // out[row] = the products
  void operator()(A* out, int64_t out_span, const A* x, int64_t span, int64_t width) const {
    (*this)(x, span, width, [&](int64_t row, int64_t i, const auto& sums) { keep(out, out_span, row, i, sums); });
  }

 private:
  static constexpr bool kIsNarrow = kChannels<Cell> > 1;

  void narrow(Cell* to, int64_t stride, const A* x, int64_t span, int64_t count) const {
    for (int64_t c = 0; c < matrix_.cells; ++c) {
      for (int64_t i = 0; i < count; i += kLanes<A>) {
        const A* const channel = x + 2 * c * span + i;
        const bool is_pair = 2 * c + 1 < columns_;
        const Vec<A> both[2] = {load(channel) * of_column_[2 * c],
                                is_pair ? load(channel + span) * of_column_[2 * c + 1] : Vec<A>{}};
        store_cells(to + c * stride + i, both);
      }
    }
  }

  template <int R, int V>
  void keep(A* out, int64_t span, int64_t row, int64_t i, const Vec<A> (&sums)[R][V]) const {
    for (int r = 0; r < R && row + r < count_; ++r) {
      for (int v = 0; v < V; ++v) store(out + (row + r) * span + i + v * kLanes<A>, sums[r][v]);
    }
  }

  Matrix<Cell> matrix_;
  Buffer<Cell> weights_;
  Buffer<A> bias_, of_row_, of_column_;
  int64_t count_, columns_;
};

// The type of sums, and what the factors of products are rounded to: where all weights are bfloat16, that, if the
// processor multiplies it.
template <class Sum, class Factor>
struct Precision {
  using A = Sum;
  using Cell = Factor;
};

template <class Run>
inline void with_precision(bool is_double, [[maybe_unused]] const Parameter& weight, const Run& run) {
  if (is_double) return run(Precision<double, double>());
#if defined(__AVX512BF16__)
  if (weight.dtype == DType::bfloat16) return run(Precision<float, Pair>());
#endif
  run(Precision<float, float>());
}

// body(r, place, sums) for the vectors of a tile's rows that exist, `rows` of them at most; place: of its first pixel.
template <int R, int V, class A, class Body>
inline void each_vector(const A (&sums)[R][V], int64_t rows, const Body& body) {
  constexpr int64_t lanes = sizeof(A) / sizeof(sums[0][0][0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (r >= rows) return;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) body(r, v * lanes, sums[r][v]);
  }
}

// x <- (x - mean) / deviation over the channels of each pixel; scale: 1 / deviation, for the gradient. V vectors. The
// mean is rounded, by more than the deviations where they are small beside it: theirs is taken off them.
template <int V, class A>
inline void normalise_vectors(A* x, int64_t span, int64_t channels, A* scale, A eps) {
  Vec<A> mean[V]{}, rest[V]{}, square[V]{};
  const A share = 1 / static_cast<A>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) mean[v] += load(x + c * span + v * kLanes<A>);
  }
  for (int v = 0; v < V; ++v) mean[v] *= share;
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      const Vec<A> d = load(x + c * span + v * kLanes<A>) - mean[v];
      rest[v] += d, square[v] += d * d;
    }
  }
  for (int v = 0; v < V; ++v) {
    rest[v] *= share;
    Vec<A> deviation = square[v] * share - rest[v] * rest[v] + eps;
    for (int64_t i = 0; i < kLanes<A>; ++i) deviation[i] = std::sqrt(deviation[i]);
    square[v] = 1 / deviation;
    store(scale + v * kLanes<A>, square[v]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      A* at = x + c * span + v * kLanes<A>;
      store(at, (load(at) - mean[v] - rest[v]) * square[v]);
    }
  }
}

template <class A>
inline void normalise_pixels(A* x, int64_t span, int64_t channels, int64_t width, A* scale, A eps) {
  int64_t i = 0;
  for (; i + 4 * kLanes<A> <= width; i += 4 * kLanes<A>) normalise_vectors<4>(x + i, span, channels, scale + i, eps);
  for (; i < width; i += kLanes<A>) normalise_vectors<1>(x + i, span, channels, scale + i, eps);
}

// d <- (d - mean(d) - x * mean(d x)) * scale, means over the channels, x normalised: from its gradient that of what
// was.
template <int V, class A>
inline void normalise_backward_vectors(A* d, const A* x, int64_t span, int64_t channels, const A* scale) {
  Vec<A> mean[V]{}, product[V]{};
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      const Vec<A> g = load(d + c * span + v * kLanes<A>);
      mean[v] += g, product[v] += g * load(x + c * span + v * kLanes<A>);
    }
  }
  for (int v = 0; v < V; ++v) mean[v] /= static_cast<A>(channels), product[v] /= static_cast<A>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      A* at = d + c * span + v * kLanes<A>;
      const Vec<A> seen = load(x + c * span + v * kLanes<A>);
      store(at, (load(at) - mean[v] - seen * product[v]) * load(scale + v * kLanes<A>));
    }
  }
}

template <class A>
inline void normalise_backward(A* d, const A* x, int64_t span, int64_t channels, int64_t width, const A* scale) {
  int64_t i = 0;
  for (; i + 4 * kLanes<A> <= width; i += 4 * kLanes<A>) {
    normalise_backward_vectors<4>(d + i, x + i, span, channels, scale + i);
  }
  for (; i < width; i += kLanes<A>) normalise_backward_vectors<1>(d + i, x + i, span, channels, scale + i);
}

}  // namespace seemore::SEEMORE_ISA
