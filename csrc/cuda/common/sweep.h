// Sweeps of stencils over images.
//
// A warp has one strip of 128 columns, or two of 64, and sweeps down, a few rows at a time; a lane has four
// neighbouring columns. Rows come from memory to registers while those before them are processed, then to shared
// memory, where lanes exchange their columns. No warp ever waits for another one; there are two in a block only because
// some GPUs hold no more than 16 blocks on a multiprocessor.
#pragma once

#include <algorithm>

#include "cuda/common/access.h"

constexpr int kLaneColumns = 4;
constexpr int kBlockWarps = 2, kThreads = kBlockWarps * kWarp;
constexpr dim3 kBlock(kWarp, kBlockWarps);

using Float4 = Pack<float, kLaneColumns>;

__device__ inline float sum_of_float4(const Float4& vector) {
  return (vector.value[0] + vector.value[1]) + (vector.value[2] + vector.value[3]);
}

// Call function(T of the dtype) for the types of sweeps: all but float64.
template <typename Function>
void with_sweep_type(seemore::DType dtype, Function function) {
  if (dtype == seemore::DType::float32) return function(float());
  if (dtype == seemore::DType::float16) return function(__half());
  return function(__nv_bfloat16());
}

// The cut of images into strips.
struct Sweep {
  int lanes;         // of a strip: 16 or 32
  int across, down;  // strips of a plane
  int rows;          // that a strip writes
  int lead;          // rows above them that it reads first: none where a strip is as high as the image
  int overlap;       // columns on both sides that it computes and a neighbour writes
  int64_t strips;

  int64_t parts(const seemore::Size& size) const { return size.batch * down * across; }

  unsigned grid(const char* kernel) const { return grid_of(ceil_div(strips * lanes, kThreads), kernel); }
};

inline int strip_step(int lanes, int overlap) { return kLaneColumns * lanes - 2 * overlap; }

constexpr int kUsualMultiprocessors = 132;  // of an H200

// Strips for a stencil with a halo of so many rows: as many as take the least time on so many multiprocessors,
// each of which holds `warps` at once. Their sums' order depends on `multiprocessors`, so where there are sums that is
// kUsualMultiprocessors on every GPU; pixels are the same whatever the strips.
inline Sweep sweep_over(const seemore::Size& size, int warps, int halo, int overlap = 0,
                        int multiprocessors = kUsualMultiprocessors) {
  if (std::max(size.height, size.width) > INT32_MAX / 2) {
    throw std::runtime_error("an image of " + std::to_string(size.height) + " x " + std::to_string(size.width) +
                             ", expected sides below 2^30");
  }
  const auto across = [&](int lanes) {
    if (size.width <= kLaneColumns * lanes) return int64_t(1);
    return ceil_div(size.width - 2 * overlap, strip_step(lanes, overlap));
  };
  const int lanes = across(16) * 16 < across(32) * 32 ? 16 : 32;
  const int64_t strips = size.height * size.width > 0 ? size.batch * size.channels * across(lanes) : 0;
  Sweep best{lanes, static_cast<int>(across(lanes)), 1, static_cast<int>(size.height), 0, overlap, strips};
  if (strips == 0) return best;
  // Rows that a multiprocessor goes through, for each of the blocks it holds at once; fewer than two thirds of them
  // take as long, for they wait for memory.
  const auto time = [&](const Sweep& sweep) {
    const int64_t held = warps / kBlockWarps;
    const int64_t blocks = ceil_div(ceil_div(sweep.strips * lanes, kThreads), multiprocessors);
    const int64_t rest = blocks % held, shared = rest == 0 ? 0 : std::max(rest, ceil_div(2 * held, 3));
    return (blocks - rest + shared) * (sweep.rows + sweep.lead + halo);
  };
  const int64_t at_once = ceil_div(int64_t(multiprocessors) * warps * kWarp, strips * lanes);
  const int64_t sensible = size.height / std::max(8, 4 * halo);  // else it is all halo
  for (int64_t down = 2; down <= std::min(sensible, 4 * at_once); ++down) {
    int64_t rows = ceil_div(size.height, down);
    rows += (kLaneColumns - (rows + 2 * halo) % kLaneColumns) % kLaneColumns;  // a multiple of the rows of a step
    Sweep sweep = best;
    sweep.down = static_cast<int>(ceil_div(size.height, rows));
    sweep.rows = static_cast<int>(rows);
    sweep.lead = sweep.down > 1 ? halo : 0;
    sweep.strips = strips * sweep.down;
    if (time(sweep) < time(best)) best = sweep;
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

  __device__ Strip(const Sweep& sweep, const seemore::Size& size)
      : lane(threadIdx.x % sweep.lanes),
        group(threadIdx.x / sweep.lanes),
        width(static_cast<int>(size.width)),
        height(static_cast<int>(size.height)) {
    unsigned strip = (blockIdx.x * kBlockWarps + threadIdx.y) * (kWarp / sweep.lanes) + group;
    const bool exists = strip < sweep.strips;
    if (!exists) strip = 0;
    const int across = strip % sweep.across;
    const unsigned band = strip / sweep.across, plane = band / sweep.down;
    const int down = band % sweep.down;
    const unsigned channels = static_cast<unsigned>(size.channels);
    batch = plane / channels;
    channel = plane % channels;
    part = (batch * sweep.down + down) * sweep.across + across;
    row = down * sweep.rows;
    end = exists ? min(row + sweep.rows, height) : row;
    first = across * (kLaneColumns * sweep.lanes - 2 * sweep.overlap);
    column = first + kLaneColumns * lane;
    const bool left = across == 0 || kLaneColumns * lane >= sweep.overlap;
    const bool right = across == sweep.across - 1 || kLaneColumns * (sweep.lanes - lane) > sweep.overlap;
    writes = exists && left && right;
    if (!exists) width = 0;
  }

  // The columns with zeros for those that the image does not have.
  __device__ Float4 real(Float4 columns) const {
#pragma unroll
    for (int v = 0; v < kLaneColumns; ++v) columns.value[v] = column + v < width ? columns.value[v] : 0;
    return columns;
  }

  __device__ bool has(int i) const { return static_cast<unsigned>(i - row) < static_cast<unsigned>(end - row); }
};

// A lane's columns of one plane, row by row downwards. kVector elements are read and written at once.
template <typename T, int kVector>
class Cursor {
  using Value = std::remove_const_t<T>;

 public:
  __device__ Cursor(const seemore::Image& image, const Strip& strip, int row, int column)
      : here_(static_cast<T*>(image.data) + strip.batch * image.batch + strip.channel * image.channel +
              row * image.row + column),
        row_(image.row),
        count_(column < 0 ? 0 : min(max(strip.width - column, 0), kLaneColumns)) {}

  __device__ Cursor(const seemore::Image& image, const Strip& strip, int row)
      : Cursor(image, strip, row, strip.column) {}

  // Load the columns here, or zeros, also beyond the image; and go on by `rows`.
  __device__ Words<Value, kLaneColumns> load(bool is_inside, int rows = 1) {
    const auto words = ::load<kVector, kLaneColumns>(here_, is_inside ? count_ : 0);
    here_ += rows * row_;
    return words;
  }

  __device__ void store(const Words<T, kLaneColumns>& words, bool is_inside) {
    ::store<kVector>(here_, is_inside ? count_ : 0, words);
    here_ += row_;
  }

 private:
  T* here_;
  int64_t row_;
  int count_;
};

// Some rows of the warp's strips in shared memory, with kHalo vectors on both sides of each; two halves, so that one is
// written while lanes may still read the other.
template <int kRows, int kHalo>
struct SharedRows {
  static constexpr int kRowStride = kWarp + 4 * kHalo;  // one strip or two
  Float4 values[2 * kRows * kRowStride];

  __device__ Float4* row(int half, int r) { return values + (half * kRows + r) * kRowStride; }

  static __device__ int place(const Strip& strip, int lanes) {
    return strip.group * (lanes + 2 * kHalo) + kHalo + strip.lane;
  }
};

// A lane's columns of a row and kHalo vectors more on both sides, as numbers.
template <int kHalo>
struct LaneWindow {
  float value[kLaneColumns * (2 * kHalo + 1)];

  __device__ explicit LaneWindow(const Float4* own) {
#pragma unroll
    for (int number = -kHalo; number <= kHalo; ++number) {
      const Float4 seen = own[number];
#pragma unroll
      for (int v = 0; v < kLaneColumns; ++v) value[kLaneColumns * (number + kHalo) + v] = seen.value[v];
    }
  }

  // Column v of the lane's own; -4 kHalo <= v < 4 (kHalo + 1).
  __device__ float operator[](int v) const { return value[kLaneColumns * kHalo + v]; }
};

// The rows of an image with the halo of the strip, kRows at a time: loaded from memory, later stored to shared rows.
template <typename T, int kVector, int kRows, int kHalo>
class RowFeed {
 public:
  __device__ RowFeed(const seemore::Image& image, const Strip& strip, const Sweep& sweep, int row, int halo)
      : own_(image, strip, row),
        edge_(image, strip, row + edge_row(strip), edge_column(strip, sweep)),
        row_(row),
        end_(min(strip.end + halo, strip.height)),
        edge_row_(edge_row(strip)),
        place_(SharedRows<kRows, kHalo>::place(strip, sweep.lanes)),
        edge_place_(strip.group * (sweep.lanes + 2 * kHalo) + (edge_vector(strip) < kHalo ? 0 : sweep.lanes) +
                    edge_vector(strip)) {}

  // Load the next rows; zeros outside of the image.
  __device__ void load() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = own_.load(has(row_ + r));
    edge = edge_.load(edge_row_ < kRows && has(row_ + edge_row_), kRows);
    row_ += kRows;
  }

  __device__ void store(SharedRows<kRows, kHalo>& stage, int half) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) stage.row(half, r)[place_] = to_accum(rows[r]);
    if (edge_row_ < kRows) stage.row(half, edge_row_)[edge_place_] = to_accum(edge);
  }

  Words<T, kLaneColumns> rows[kRows], edge;

 private:
  // Of the vectors beside the strip, which are fewer than its lanes, each lane has one or none.
  static __device__ int edge_row(const Strip& strip) { return strip.lane / (2 * kHalo); }
  static __device__ int edge_vector(const Strip& strip) { return strip.lane % (2 * kHalo); }
  static __device__ int edge_column(const Strip& strip, const Sweep& sweep) {
    const int number = edge_vector(strip);
    return strip.first + kLaneColumns * (number < kHalo ? number - kHalo : sweep.lanes + number - kHalo);
  }

  __device__ bool has(int row) const { return static_cast<unsigned>(row) < static_cast<unsigned>(end_); }

  static_assert(2 * kHalo * kRows <= 16, "a lane each");

  Cursor<const T, kVector> own_, edge_;
  int row_, end_, edge_row_;
  int place_, edge_place_;
};

// The sum of all lanes of the strip, in each of them.
__device__ inline float sum_of_strip(float sum, const Sweep& sweep) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  const float other = __shfl_xor_sync(kAllLanes, sum, 16);
  return sweep.lanes == kWarp ? sum + other : sum;
}
