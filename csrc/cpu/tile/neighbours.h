// Taps along a row from whole vectors: the input of a tap is shifted together out of two of them. A load across the
// ends of vectors that were only just stored would wait for these stores, longer than all taps take.
#pragma once

#include "cpu/tile/tiling.h"

namespace seemore::SEEMORE_ISA {

template <int r, class V, size_t... i>
inline V shifted_lanes(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, r + i...);
}

// Elements r, r + 1, .. of `a` and `b`, one after the other.
template <int r, class V>
inline V shifted(V a, V b) {
  static_assert(r > 0 && r < sizeof(V) / sizeof(a[0]));
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) {  // else the compiler takes a permutation of two registers, which is slower
    return bit_cast<V>(_mm512_alignr_epi32(bit_cast<__m512i>(b), bit_cast<__m512i>(a), r));
  }
#endif
  return shifted_lanes<r>(a, b, LaneIndices<V>());
}

// A row from x on, and the vectors on both sides of it.
template <class A>
struct EdgedRow {
  const A* x;
  Vec<A> left, right;
};

// Whether the halo of K taps lies within the next vectors; K = 0 stands for any number of taps.
template <int K, class A>
constexpr bool kAreNear = K > 0 && K / 2 <= kLanes<A>;

// A vector of a row and its neighbours.
template <class A>
struct Neighbours {
  Vec<A> before, here, behind;

  template <int offset>
  Vec<A> tap() const {
    if constexpr (offset == 0) return here;
    if constexpr (offset == kLanes<A>) return behind;
    if constexpr (offset == -kLanes<A>) return before;
    if constexpr (offset > 0 && offset < kLanes<A>) return shifted<offset>(here, behind);
    if constexpr (offset < 0 && offset > -kLanes<A>) return shifted<offset + kLanes<A>>(before, here);
  }
};

// Call each(i, Neighbours) for the vectors of a row.
template <class A, class Each>
inline void slide(const EdgedRow<A>& row, int64_t length, const Each& each) {
  Neighbours<A> window{row.left, row.left, load(row.x)};
  for (int64_t i = 0; i < length; i += kLanes<A>) {
    window = {window.here, window.behind, i + kLanes<A> < length ? load(row.x + i + kLanes<A>) : row.right};
    each(i, window);
  }
}

// Call each(Constant<k>) for k < K.
template <int K, int k = 0, class Each>
inline void each_tap(const Each& each) {
  if constexpr (k < K) {
    each(Constant<k>());
    each_tap<K, k + 1>(each);
  }
}

// out[i] = bias + sum_k weight[k] * x[i + k - K / 2]
template <int K, class A>
inline void row_taps(A* out, const EdgedRow<A>& row, const Taps<A>& taps, int64_t length) {
  if constexpr (kAreNear<K, A>) {
    Vec<A> weight[K];
    for (int k = 0; k < K; ++k) weight[k] = broadcast(taps.weight[k]);
    slide(row, length, [&](int64_t i, const Neighbours<A>& x) {
      Vec<A> sum = broadcast(taps.bias);
      each_tap<K>([&](auto k) {
        constexpr int tap = decltype(k)::value;
        sum += weight[tap] * x.template tap<tap - K / 2>();
      });
      store(out + i, sum);
    });
  } else {
    row_taps<K>(out, row.x - taps.count / 2, taps, length);
  }
}

// sum[k] += sum_i dy[i] * x[i + k - K / 2]: the gradient of row_taps' weights.
template <int K, class A>
inline void row_tap_gradients(Vec<A>* sum, const A* dy, const EdgedRow<A>& row, int64_t count, int64_t length) {
  if constexpr (kAreNear<K, A>) {
    Vec<A> local[K];
    for (int k = 0; k < K; ++k) local[k] = sum[k];
    slide(row, length, [&](int64_t i, const Neighbours<A>& x) {
      const Vec<A> d = load(dy + i);
      each_tap<K>([&](auto k) {
        constexpr int tap = decltype(k)::value;
        local[tap] += d * x.template tap<tap - K / 2>();
      });
    });
    for (int k = 0; k < K; ++k) sum[k] = local[k];
  } else {
    row_tap_gradients<K>(sum, dy, row.x - count / 2, count, length);
  }
}

// A reader of a tile's rows: in place where they lie in memory as they are needed, else by a copy with `margin` columns
// on either side, zero outside the image.
template <class T, class A = Accumulate<T>>
class RowReader {
 public:
  // `rows` at a time, of at most so many columns and channels, margins included.
  RowReader(const Image& image, const Size& size, int64_t rows, int64_t channels, int64_t columns)
      : image_(image),
        size_(size),
        buffers_(image.data ? rows : 0, channels * columns),
        zeros_(1, columns),
        rows_(rows) {}

  // Go to columns [begin, begin + width) of the tile's channels. `far`: taps reach beyond the next vectors.
  void move(const Tile& tile, int64_t begin, int64_t width, int64_t margin, bool far) {
    place_ = {tile.b, tile.c, tile.channels, 0, begin - margin, width + 2 * margin};
    margin_ = margin, width_ = width;
    is_direct_ = sizeof(T) == sizeof(A) && !far && image_.column == 1 && tile.channels == 1 && begin == 0 &&
                 width == size_.width;
  }

  // Read row h of the image as number n; 0 outside.
  void read(int64_t n, int64_t h) {
    if (is_direct_) {
      const bool is_inside = h >= 0 && h < size_.height;
      rows_[n] = is_inside ? address<const A>(image_, place_.b, place_.c, h, 0) : zeros_[0];
      for (int64_t i = 0; i < width_; i += 64 / sizeof(A)) __builtin_prefetch(rows_[n] + i + kAhead * image_.row);
    } else {
      place_.h = h;
      load_rows<T>(buffers_[n], image_, size_, place_, place_.row_stride);
      rows_[n] = buffers_[n] + margin_;
    }
  }

  const A* row(int64_t n, int64_t c) const { return rows_[n] + c * place_.row_stride; }
  EdgedRow<A> edged_row(int64_t n, int64_t c) const {
    const A* const x = row(n, c);
    if (is_direct_) return {x, Vec<A>{}, Vec<A>{}};
    return {x, load(x - kLanes<A>), load(x + width_)};
  }

 private:
  static constexpr int64_t kAhead = 4;  // rows
  const Image& image_;
  const Size& size_;
  Place place_{};
  int64_t margin_ = 0, width_ = 0;
  bool is_direct_ = false;
  Rows<A> buffers_, zeros_;
  Buffer<const A*> rows_;
};

}  // namespace seemore::SEEMORE_ISA
