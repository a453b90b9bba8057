// How the stencils walk over images.
//
// A warp has one strip of 128 columns, or two of 64, and walks down, a few rows at a time; a lane has four neighbouring
// columns, a quad. Rows come from memory to registers while those before them are worked on, then to shared memory,
// where a lane sees its neighbours' quads. No warp ever waits for another one; there are two in a block only because
// some GPUs hold no more than 16 blocks on a multiprocessor.
#pragma once

#include <algorithm>

#include "cuda/common/access.h"

constexpr int kQuad = 4;
constexpr int kBlockWarps = 2, kThreads = kBlockWarps * kWarp;
constexpr dim3 kBlock(kWarp, kBlockWarps);

template <typename T>
using Quad = Pack<T, kQuad>;

__device__ inline float sum_of_quad(const Quad<float>& quad) {
  return (quad.value[0] + quad.value[1]) + (quad.value[2] + quad.value[3]);
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

inline int strip_step(int lanes, int overlap) { return kQuad * lanes - 2 * overlap; }

constexpr int kUsualMultiprocessors = 132;  // of an H200

// Strips for a stencil that looks `reach` rows up and down: as many as take the least time on so many multiprocessors,
// each of which holds `warps` at once. Their sums' order depends on `multiprocessors`, so where there are sums that is
// kUsualMultiprocessors on every GPU; pixels are the same whatever the strips.
inline Walk walk_over(const seemore::Size& size, int warps, int reach, int overlap = 0,
                      int multiprocessors = kUsualMultiprocessors) {
  if (std::max(size.height, size.width) > INT32_MAX / 2) {
    throw std::runtime_error("an image of " + std::to_string(size.height) + " x " + std::to_string(size.width) +
                             ", expected sides below 2^30");
  }
  const auto across = [&](int lanes) {
    if (size.width <= kQuad * lanes) return int64_t(1);
    return ceil_div(size.width - 2 * overlap, strip_step(lanes, overlap));
  };
  const int lanes = across(16) * 16 < across(32) * 32 ? 16 : 32;
  const int64_t strips = size.height * size.width > 0 ? size.batch * size.channels * across(lanes) : 0;
  Walk best{lanes, static_cast<int>(across(lanes)), 1, static_cast<int>(size.height), 0, overlap, strips};
  if (strips == 0) return best;
  // Rows that a multiprocessor goes through, for each of the blocks it holds at once; fewer than two thirds of them
  // take as long, for they wait for memory.
  const auto time = [&](const Walk& walk) {
    const int64_t held = warps / kBlockWarps;
    const int64_t blocks = ceil_div(ceil_div(walk.strips * lanes, kThreads), multiprocessors);
    const int64_t rest = blocks % held, shared = rest == 0 ? 0 : std::max(rest, ceil_div(2 * held, 3));
    return (blocks - rest + shared) * (walk.rows + walk.lead + reach);
  };
  const int64_t at_once = ceil_div(int64_t(multiprocessors) * warps * kWarp, strips * lanes);
  const int64_t sensible = size.height / std::max(8, 4 * reach);  // else it is all neighbourhood
  for (int64_t down = 2; down <= std::min(sensible, 4 * at_once); ++down) {
    int64_t rows = ceil_div(size.height, down);
    rows += (kQuad - (rows + 2 * reach) % kQuad) % kQuad;  // a multiple of what is done at a time
    Walk walk = best;
    walk.down = static_cast<int>(ceil_div(size.height, rows));
    walk.rows = static_cast<int>(rows);
    walk.lead = walk.down > 1 ? reach : 0;
    walk.strips = strips * walk.down;
    if (time(walk) < time(best)) best = walk;
  }
  grid_of(best.strips, "strips");  // which kernels count in 32 bits
  return best;
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

// Goes down a column of quads of one plane. kVector elements of a quad are read and written at once.
template <typename T, int kVector>
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
  __device__ Words<Value, kQuad> take(bool is_inside, int rows = 1) {
    const auto words = load<kVector, kQuad>(here_, column_, is_inside ? count_ : 0);
    here_ += rows * row_;
    return words;
  }

  __device__ void put(const Words<T, kQuad>& quad, bool is_inside) {
    store<kVector>(here_, column_, is_inside ? count_ : 0, quad);
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
template <typename T, int kVector, int kRows, int kHalo>
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

  Words<T, kQuad> rows[kRows], edge;

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

  Cursor<const T, kVector> own_, edge_;
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
