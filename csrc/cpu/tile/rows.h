// Row primitives: the loops that every operator of the library consists of.
//
// A row is one image row of one channel in the accumulation type A, contiguous. Lengths are rounded up to whole
// vectors, so rows have room for that; padding beyond the image is finite, and never stored.
#pragma once

#include <new>

#include "cpu/simd/vec.h"
#include "params/views.h"

namespace seemore::SEEMORE_ISA {

// Memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Rows of so many elements one after another, zeroed.
template <class A>
class Block {
 public:
  Block(int64_t rows, int64_t row_stride) : row_stride_(row_stride), data_(rows * row_stride) {
    std::memset(data_, 0, rows * row_stride * sizeof(A));
  }
  int64_t row_stride() const { return row_stride_; }
  A* operator[](int64_t row) const { return data_ + row * row_stride_; }
  operator A*() const { return data_; }

 private:
  int64_t row_stride_;
  Buffer<A> data_;
};

// The rows of one task, with a vector of room behind each.
template <class A>
struct Rows : Block<A> {
  Rows(int64_t count, int64_t length) : Block<A>(count, round_up(length, kLanes<A>) + kLanes<A>) {}
};

// The last `count` rows of a stream: window[0] is the oldest.
template <class A>
class RowWindow {
 public:
  RowWindow(int64_t count, int64_t length) : rows_(count, length), count_(count), order_(2 * count) {
    for (int64_t i = 0; i < 2 * count; ++i) order_[i] = rows_[i % count];
  }

  A* operator[](int64_t i) const { return order_[oldest_ + i]; }
  A* const* rows() const { return order_ + oldest_; }

  // Drop the `steps` oldest rows; their memory becomes the newest ones.
  void advance(int64_t steps) { oldest_ = (oldest_ + steps) % count_; }

 private:
  Rows<A> rows_;
  int64_t count_, oldest_ = 0;
  Buffer<A*> order_;  // 2 * count: so that any `count` of them in turn lie side by side
};

template <class T>
inline T* address(const Image& image, int64_t b, int64_t c, int64_t h, int64_t w) {
  return static_cast<T*>(image.data) + b * image.batch + c * image.channel + h * image.row + w * image.column;
}

// The place of an image where rows are read or written: image b, `channels` channels from c on, row h, from column w
// on. The rows of several channels lie `row_stride` elements apart.
struct Place {
  int64_t b, c, channels, h, w, row_stride;
};

// out[c][i] = image[w + i] for i < count, 0 outside the image.
template <class T, class A = Accumulate<T>>
inline void load_rows(A* out, const Image& image, const Size& size, const Place& place, int64_t count) {
  if (place.h < 0 || place.h >= size.height) {
    for (int64_t c = 0; c < place.channels; ++c) std::memset(out + c * place.row_stride, 0, count * sizeof(A));
    return;
  }
  const int64_t begin = smaller(larger(0, -place.w), count);
  const int64_t end = larger(begin, smaller(count, size.width - place.w));
  for (int64_t c = 0; c < place.channels; ++c) {  // by whole vectors: rows have room, and memset costs a call
    for (int64_t i = 0; i < begin; i += kLanes<A>) store(out + c * place.row_stride + i, Vec<A>{});
    for (int64_t i = end; i < count; i += kLanes<A>) store(out + c * place.row_stride + i, Vec<A>{});
  }
  const T* from = address<T>(image, place.b, place.c, place.h, place.w);
  if (image.column == 1) {
    for (int64_t c = 0; c < place.channels; ++c) {
      const T* row = from + c * image.channel;
      A* to = out + c * place.row_stride;
      int64_t i = begin;
      for (; i + kLanes<A> <= end; i += kLanes<A>) {
        __builtin_prefetch(row + i + image.row);  // of the next row, a jump that the processor does not foresee
        store(to + i, load(row + i));
      }
      for (; i < end; ++i) to[i] = load_one(row + i);
    }
    return;
  }
  for (int64_t i = begin; i < end;) {
    const T* pixel = from + i * image.column;
    int64_t c = 0, columns = 1;
    if (image.channel == 1 && i + 4 <= end) {
      columns = 4;
      for (; c + 4 <= place.channels; c += 4)
        transpose_load(out + c * place.row_stride + i, place.row_stride, pixel + c, image.column);
    }
    for (; c < place.channels; ++c) {
      for (int64_t j = 0; j < columns; ++j) {
        out[c * place.row_stride + i + j] = load_one(pixel + c * image.channel + j * image.column);
      }
    }
    i += columns;
  }
}

// image[w + i] = epilogue(rows[c][i], offset of that element) for i < count; the epilogue takes vectors. Rows may
// change.
template <class T, class Epilogue, class A = Accumulate<T>>
inline void store_rows(const Image& image, const Place& place, A* rows, int64_t count, const Epilogue& epilogue) {
  T* to = address<T>(image, place.b, place.c, place.h, place.w);
  if (image.column == 1) {
    for (int64_t c = 0; c < place.channels; ++c) {
      A* row = rows + c * place.row_stride;
      T* target = to + c * image.channel;
      int64_t i = 0;
      for (; i + kLanes<A> <= count; i += kLanes<A>) {
        __builtin_prefetch(target + i + 4 * image.row, 1, 2);
        store(target + i, epilogue(load(row + i), c * place.row_stride + i));
      }
      if (i < count) store(row + i, epilogue(load(row + i), c * place.row_stride + i));
      for (; i < count; ++i) store_one(target + i, row[i]);
    }
    return;
  }
  for (int64_t c = 0; c < place.channels; ++c) {
    A* row = rows + c * place.row_stride;
    for (int64_t i = 0; i < count; i += kLanes<A>) store(row + i, epilogue(load(row + i), c * place.row_stride + i));
  }
  for (int64_t i = 0; i < count;) {
    T* pixel = to + i * image.column;
    int64_t c = 0, columns = 1;
    if (image.channel == 1 && i + 4 <= count) {
      columns = 4;
      for (; c + 4 <= place.channels; c += 4) {
        transpose_store(pixel + c, image.column, rows + c * place.row_stride + i, place.row_stride);
      }
    }
    for (; c < place.channels; ++c) {
      for (int64_t j = 0; j < columns; ++j) {
        store_one(pixel + c * image.channel + j * image.column, rows[c * place.row_stride + i + j]);
      }
    }
    i += columns;
  }
}

template <class T, class A = Accumulate<T>>
inline void store_rows(const Image& image, const Place& place, A* rows, int64_t count) {
  store_rows<T>(image, place, rows, count, [](Vec<A> v, int64_t) { return v; });
}

// The taps of a stencil along one axis; K > 0 is known to the compiler, K = 0 stands for `count`.
template <class A>
struct Taps {
  const A* weight;
  int64_t count;
  A bias;
};

// out[r][i] = bias + sum_k weight[k] * rows[r + k][i], begin <= i < begin + length, for R rows at once: every row is
// loaded once for R results.
template <int K, int R, class A>
inline void column_taps(A* const* out, A* const* rows, const Taps<A>& taps, int64_t begin, int64_t length) {
  const int64_t count = K ? K : taps.count;
  Vec<A> weight[K ? K : 1];
  for (int k = 0; k < K; ++k) weight[k] = broadcast(taps.weight[k]);
  for (int64_t i = begin; i < begin + length; i += kLanes<A>) {
    Vec<A> sum[R];
    for (int r = 0; r < R; ++r) sum[r] = broadcast(taps.bias);
    if constexpr (K > 0) {
#pragma GCC unroll 64
      for (int j = 0; j < K + R - 1; ++j) {
        const Vec<A> v = load(rows[j] + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (j - r >= 0 && j - r < K) sum[r] += weight[j - r] * v;
        }
      }
    } else {
      for (int64_t k = 0; k < count; ++k) {
        for (int r = 0; r < R; ++r) sum[r] += taps.weight[k] * load(rows[r + k] + i);
      }
    }
    for (int r = 0; r < R; ++r) store(out[r] + i, sum[r]);
  }
}

// out[i] = bias + sum_k weight[k] * x[i + k]
template <int K, class A>
inline void row_taps(A* out, const A* x, const Taps<A>& taps, int64_t length) {
  const int64_t count = K ? K : taps.count;
  Vec<A> weight[K ? K : 1];
  for (int k = 0; k < K; ++k) weight[k] = broadcast(taps.weight[k]);
  for (int64_t i = 0; i < length; i += kLanes<A>) {
    Vec<A> sum = broadcast(taps.bias);
    if constexpr (K > 0) {
#pragma GCC unroll 64
      for (int k = 0; k < K; ++k) sum += weight[k] * load(x + i + k);
    } else {
      for (int64_t k = 0; k < count; ++k) sum += taps.weight[k] * load(x + i + k);
    }
    store(out + i, sum);
  }
}

// sum[k] += sum_{r, i} dy[r][i] * rows[r + k][i], begin <= i < begin + length: the gradient of column_taps' weights.
template <int K, int R, class A>
inline void column_tap_gradients(Vec<A>* sum, const A* const* dy, A* const* rows, int64_t count, int64_t begin,
                                 int64_t length) {
  if constexpr (K > 0) {
    Vec<A> local[K];
    for (int k = 0; k < K; ++k) local[k] = sum[k];
    for (int64_t i = begin; i < begin + length; i += kLanes<A>) {
      Vec<A> d[R];
      for (int r = 0; r < R; ++r) d[r] = load(dy[r] + i);
#pragma GCC unroll 64
      for (int j = 0; j < K + R - 1; ++j) {
        const Vec<A> v = load(rows[j] + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (j - r >= 0 && j - r < K) local[j - r] += d[r] * v;
        }
      }
    }
    for (int k = 0; k < K; ++k) sum[k] = local[k];
  } else {
    for (int64_t k = 0; k < count; ++k) {
      for (int r = 0; r < R; ++r) {
        for (int64_t i = begin; i < begin + length; i += kLanes<A>) sum[k] += load(dy[r] + i) * load(rows[r + k] + i);
      }
    }
  }
}

// sum[k] += sum_i dy[i] * x[i + k]: the gradient of row_taps' weights.
template <int K, class A>
inline void row_tap_gradients(Vec<A>* sum, const A* dy, const A* x, int64_t count, int64_t length) {
  if constexpr (K > 0) {
    Vec<A> local[K];
    for (int k = 0; k < K; ++k) local[k] = sum[k];
    for (int64_t i = 0; i < length; i += kLanes<A>) {
      const Vec<A> d = load(dy + i);
#pragma GCC unroll 64
      for (int k = 0; k < K; ++k) local[k] += d * load(x + i + k);
    }
    for (int k = 0; k < K; ++k) sum[k] = local[k];
  } else {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = 0; i < length; i += kLanes<A>) sum[k] += load(dy + i) * load(x + i + k);
    }
  }
}

// v after a round trip through storage.
template <class T, class A = Accumulate<T>>
inline Vec<A> as_stored(Vec<A> v) {
  if constexpr (sizeof(T) == sizeof(A)) return v;
  T stored[kLanes<A>];
  store(stored, v);
  return load(stored);
}

template <class A>
inline Vec<A> row_sum(const A* row, int64_t length) {
  Vec<A> sum{};
  for (int64_t i = 0; i < length; i += kLanes<A>) sum += load(row + i);
  return sum;
}

}  // namespace seemore::SEEMORE_ISA
