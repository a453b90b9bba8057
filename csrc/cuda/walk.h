// How the stencils walk over images.
//
// A warp has one strip of 128 columns, or two of 64, and walks down, a few rows at a time; a lane has four neighbouring
// columns, a quad. Rows come from memory to registers while those before them are worked on, then to shared memory,
// where a lane sees its neighbours' quads. No warp ever waits for another one; there are two in a block only because
// some GPUs hold no more than 16 blocks on a multiprocessor.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "types.h"

constexpr int kQuad = 4;
constexpr int kBlockWarps = 2, kThreads = kBlockWarps * kWarp;
constexpr dim3 kBlock(kWarp, kBlockWarps);

template <typename T>
struct alignas(kQuad * sizeof(T)) Quad {
  T value[kQuad];
};

__device__ inline Quad<float> product(const Quad<float>& a, const Quad<float>& b) {
  Quad<float> result;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) result.value[v] = a.value[v] * b.value[v];
  return result;
}

__device__ inline float sum_of_quad(const Quad<float>& quad) {
  return (quad.value[0] + quad.value[1]) + (quad.value[2] + quad.value[3]);
}

// As memory has it: 16-bit elements of a Quad that is not all read would travel one by one.
template <typename T>
struct alignas(sizeof(Quad<T>)) Words {
  uint32_t value[sizeof(Quad<T>) / 4];
};

template <typename T>
__device__ Quad<float> widen(const Quad<T>& quad) {
  Quad<float> wide;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) wide.value[v] = widen(quad.value[v]);
  return wide;
}

// A bfloat16 is the upper half of a float.
__device__ inline Quad<float> widen(const Quad<__nv_bfloat16>& quad) {
  uint32_t pairs[kQuad / 2], bits[kQuad];
  memcpy(pairs, &quad, sizeof(quad));
#pragma unroll
  for (int v = 0; v < kQuad; ++v) bits[v] = v % 2 ? pairs[v / 2] & 0xffff0000 : pairs[v / 2] << 16;
  Quad<float> wide;
  memcpy(&wide, bits, sizeof(wide));
  return wide;
}

template <typename T>
__device__ Quad<T> narrow(const Quad<float>& quad) {
  Quad<T> result;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) result.value[v] = narrow<T>(quad.value[v]);
  return result;
}

// function(T of the dtype), for the types that the walks are made for: all but float64
template <typename Function>
void with_narrow_type(seemore::DType dtype, Function function) {
  if (dtype == seemore::DType::float32) return function(float());
  if (dtype == seemore::DType::float16) return function(__half());
  return function(__nv_bfloat16());
}

// Images are cut into strips.
struct Walk {
  int lanes;         // of a strip: 16 or 32
  int across, down;  // strips of a plane
  int rows;          // that a strip writes
  int lead;          // rows above them that it reads first: none where a strip is as high as the image
  int overlap;       // columns on both sides that it computes and a neighbour writes
  int64_t strips;

  int64_t parts(const seemore::Size& size) const { return size.batch * down * across; }

  unsigned grid(const char* kernel) const { return grid_of(ceil_div(strips * lanes, kThreads), kernel); }
};

// Whether quads of these images are neighbours in memory, at multiples of their size.
inline bool are_aligned(std::initializer_list<seemore::Image> images, int64_t width, size_t bytes) {
  return std::all_of(images.begin(), images.end(), [&](const seemore::Image& image) {
    return image.data == nullptr ||
           (image.column == 1 && (image.batch | image.channel | image.row | width) % kQuad == 0 &&
            reinterpret_cast<uintptr_t>(image.data) % (kQuad * bytes) == 0);
  });
}

// function(a bool_constant): kAligned
template <typename Function>
void with_alignment(bool is_aligned, Function function) {
  is_aligned ? function(std::true_type()) : function(std::false_type());
}

inline int strip_step(int lanes, int overlap) { return kQuad * lanes - 2 * overlap; }

// Strips for a stencil that looks `reach` rows up and down, enough for as many warps as a GPU runs at once. Their
// number depends on the size alone.
inline Walk walk_over(const seemore::Size& size, int warps_per_multiprocessor, int reach, int overlap = 0) {
  constexpr int64_t kMultiprocessors = 132;  // of an H200
  if (std::max(size.height, size.width) > INT32_MAX / 2) {
    throw std::runtime_error("an image of " + std::to_string(size.height) + " x " + std::to_string(size.width) +
                             ", expected sides below 2^30");
  }
  const auto across = [&](int lanes) {
    if (size.width <= kQuad * lanes) return int64_t(1);
    return ceil_div(size.width - 2 * overlap, strip_step(lanes, overlap));
  };
  const int lanes = across(16) * 16 < across(32) * 32 ? 16 : 32;
  const int64_t planes = size.batch * size.channels;
  const int64_t warps = std::max<int64_t>(1, ceil_div(planes * across(lanes) * lanes, kWarp));
  const int64_t most = std::max<int64_t>(1, size.height / std::max(8, 4 * reach));  // else it is all neighbourhood
  int64_t down = std::clamp<int64_t>(kMultiprocessors * warps_per_multiprocessor / warps, 1, most);
  int64_t rows = ceil_div(size.height, down);
  if (down > 1) rows += (kQuad - (rows + 2 * reach) % kQuad) % kQuad;  // a multiple of what is done at a time
  down = ceil_div(size.height, rows);
  const int64_t strips = planes * across(lanes) * down;
  grid_of(strips, "strips");  // which kernels count in 32 bits
  return {lanes,
          static_cast<int>(across(lanes)),
          static_cast<int>(down),
          static_cast<int>(rows),
          down > 1 ? reach : 0,
          overlap,
          strips};
}

// The lane's place: its strip and its columns.
struct Strip {
  int64_t batch, channel, part;  // part: the strip's number among those of its channel
  int lane, group;               // within the strip; the strip within the warp
  int row, end;                  // the rows that it writes: [row, end)
  int column, first;             // of the lane, of the strip
  int width, height;             // of the image; 0 columns where there are fewer strips than places for them
  bool writes;                   // the lane's columns; else a neighbouring strip does

  __device__ Strip(const Walk& walk, const seemore::Size& size)
      : lane(threadIdx.x % walk.lanes),
        group(threadIdx.x / walk.lanes),
        width(static_cast<int>(size.width)),
        height(static_cast<int>(size.height)) {
    unsigned strip = (blockIdx.x * kBlockWarps + threadIdx.y) * (kWarp / walk.lanes) + group;
    const bool exists = strip < walk.strips;
    if (!exists) strip = 0;
    const int across = strip % walk.across;
    const unsigned band = strip / walk.across, plane = band / walk.down;
    const int down = band % walk.down;
    const unsigned channels = static_cast<unsigned>(size.channels);
    batch = plane / channels;
    channel = plane % channels;
    part = (batch * walk.down + down) * walk.across + across;
    row = down * walk.rows;
    end = exists ? min(row + walk.rows, height) : row;
    first = across * (kQuad * walk.lanes - 2 * walk.overlap);
    column = first + kQuad * lane;
    const bool left = across == 0 || kQuad * lane >= walk.overlap;
    const bool right = across == walk.across - 1 || kQuad * (walk.lanes - lane) > walk.overlap;
    writes = exists && left && right;
    if (!exists) width = 0;
  }

  // The quad with zeros in columns that the image does not have.
  __device__ Quad<float> real(Quad<float> quad) const {
#pragma unroll
    for (int v = 0; v < kQuad; ++v) quad.value[v] = column + v < width ? quad.value[v] : 0;
    return quad;
  }

  __device__ bool has(int i) const { return static_cast<unsigned>(i - row) < static_cast<unsigned>(end - row); }
};

// Goes down a column of quads of one plane. kAligned: quads are read and written at once; see are_aligned.
template <typename T, bool kAligned>
class Cursor {
  using Value = std::remove_const_t<T>;

 public:
  __device__ Cursor(const seemore::Image& image, const Strip& strip, int row, int column)
      : here_(static_cast<T*>(image.data) + strip.batch * image.batch + strip.channel * image.channel +
              row * image.row + column * image.column),
        row_(image.row),
        column_(image.column),
        count_(column < 0 ? 0 : min(max(strip.width - column, 0), kQuad)) {}

  __device__ Cursor(const seemore::Image& image, const Strip& strip, int row)
      : Cursor(image, strip, row, strip.column) {}

  // The quad here, or zeros, also in columns beyond the image; and goes on by `rows`.
  __device__ Quad<Value> take(bool is_inside, int rows = 1) {
    Quad<Value> quad;
    if constexpr (kAligned) {
      Words<Value> words = {};
      if (is_inside && count_ > 0) words = *reinterpret_cast<const Words<Value>*>(here_);
      memcpy(&quad, &words, sizeof(quad));
    } else {
#pragma unroll
      for (int v = 0; v < kQuad; ++v) quad.value[v] = is_inside && v < count_ ? here_[v * column_] : Value(0.f);
    }
    here_ += rows * row_;
    return quad;
  }

  __device__ void put(const Quad<T>& quad, bool is_inside) {
    if (is_inside && count_ > 0) {
      if constexpr (kAligned) {
        *reinterpret_cast<Quad<T>*>(here_) = quad;
      } else {
#pragma unroll
        for (int v = 0; v < kQuad; ++v) {
          if (v < count_) here_[v * column_] = quad.value[v];
        }
      }
    }
    here_ += row_;
  }

 private:
  T* here_;
  int64_t row_, column_;
  int count_;
};

// Some rows of the warp's strips in shared memory, with kHalo quads on both sides of each; twice, so that one half is
// written while lanes may still read the other.
template <int kRows, int kHalo>
struct Stage {
  static constexpr int kPitch = kWarp + 4 * kHalo;  // one strip or two
  Quad<float> quads[2 * kRows * kPitch];

  __device__ Quad<float>* row(int half, int r) { return quads + (half * kRows + r) * kPitch; }

  static __device__ int place(const Strip& strip, int lanes) {
    return strip.group * (lanes + 2 * kHalo) + kHalo + strip.lane;
  }
};

// What a lane sees of a row: its own quad and kHalo more on both sides, as numbers.
template <int kHalo>
struct Window {
  float value[kQuad * (2 * kHalo + 1)];

  __device__ explicit Window(const Quad<float>* own) {
#pragma unroll
    for (int quad = -kHalo; quad <= kHalo; ++quad) {
      const Quad<float> seen = own[quad];
#pragma unroll
      for (int v = 0; v < kQuad; ++v) value[kQuad * (quad + kHalo) + v] = seen.value[v];
    }
  }

  // Column v of the lane's own quad; -4 kHalo <= v < 4 (kHalo + 1).
  __device__ float operator[](int v) const { return value[kQuad * kHalo + v]; }
};

// The rows of an image with what lies beside the strip, kRows at a time: taken from memory, later put on a stage.
template <typename T, bool kAligned, int kRows, int kHalo>
class Feed {
 public:
  __device__ Feed(const seemore::Image& image, const Strip& strip, const Walk& walk, int row, int reach)
      : own_(image, strip, row),
        edge_(image, strip, row + edge_row(strip), edge_column(strip, walk)),
        row_(row),
        end_(min(strip.end + reach, strip.height)),
        edge_row_(edge_row(strip)),
        place_(Stage<kRows, kHalo>::place(strip, walk.lanes)),
        edge_place_(strip.group * (walk.lanes + 2 * kHalo) + (edge_quad(strip) < kHalo ? 0 : walk.lanes) +
                    edge_quad(strip)) {}

  // The next rows; zeros outside of the image.
  __device__ void take() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = own_.take(has(row_ + r));
    edge = edge_.take(edge_row_ < kRows && has(row_ + edge_row_), kRows);
    row_ += kRows;
  }

  __device__ void put(Stage<kRows, kHalo>& stage, int half) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) stage.row(half, r)[place_] = widen(rows[r]);
    if (edge_row_ < kRows) stage.row(half, edge_row_)[edge_place_] = widen(edge);
  }

  // The same of the products with another image's rows.
  __device__ void put_product(const Feed& other, Stage<kRows, kHalo>& stage, int half) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) stage.row(half, r)[place_] = product(widen(rows[r]), widen(other.rows[r]));
    if (edge_row_ < kRows) stage.row(half, edge_row_)[edge_place_] = product(widen(edge), widen(other.edge));
  }

  Quad<T> rows[kRows], edge;

 private:
  // Of the quads beside the strip, which are fewer than its lanes, each lane has one or none.
  static __device__ int edge_row(const Strip& strip) { return strip.lane / (2 * kHalo); }
  static __device__ int edge_quad(const Strip& strip) { return strip.lane % (2 * kHalo); }
  static __device__ int edge_column(const Strip& strip, const Walk& walk) {
    const int quad = edge_quad(strip);
    return strip.first + kQuad * (quad < kHalo ? quad - kHalo : walk.lanes + quad - kHalo);
  }

  __device__ bool has(int row) const { return static_cast<unsigned>(row) < static_cast<unsigned>(end_); }

  static_assert(2 * kHalo * kRows <= 16, "a lane each");

  Cursor<const T, kAligned> own_, edge_;
  int row_, end_, edge_row_;
  int place_, edge_place_;
};

// The sum of all lanes of the strip, in each of them.
__device__ inline float sum_of_strip(float sum, const Walk& walk) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  const float other = __shfl_xor_sync(kAllLanes, sum, 16);
  return walk.lanes == kWarp ? sum + other : sum;
}
