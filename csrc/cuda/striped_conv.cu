// striped_conv on CUDA: y = gate * activation(column(row(x) + bias_row) + bias_col), and its gradients.
//
// A block makes a tile of one (H, W) plane in shared memory, with a halo of K / 2 pixels where a step looks further
// than its result. Forward: x -> r = row(x) + bias_row -> s = column(r) + bias_col -> y. Backward recomputes r and s
// in a first kernel, which leaves ds, the gradient of s, in global memory; a second one takes ds through the
// transposed steps. All sums are of the accumulation type: float, or double for double.

#include <algorithm>

#include "striped_conv.h"
#include "striped_conv_walk.h"

namespace {

using seemore::Image;
using seemore::Size;
using seemore::StripedConv;
using seemore::StripedConvGradients;

constexpr int kMaxTaps = 31;  // Python sends larger kernels elsewhere
constexpr int kTileWidth = 32, kTileHeight = 16;
constexpr int kTileWarps = 8, kTileThreads = kWarp * kTileWarps;
static_assert(kTileWidth == kWarp, "a warp is a row of the block's threads and of the tile");
constexpr int kBlocks = 3;  // at least, on a multiprocessor: 80 registers each, for with 64 some kernels spill

// Where elements of a type are in shared memory: weights (2K), then three rectangles.
struct Shared {
  int first, second, third, end;
};

// x with halo, r with halo above and below, ds
constexpr __host__ __device__ Shared forward_shared(int taps) {
  const int height = kTileHeight + taps - 1, width = kTileWidth + taps - 1;
  const int first = 2 * taps, second = first + height * width, third = second + height * kTileWidth;
  return {first, second, third, third + kTileHeight * kTileWidth};
}

// ds with halo, dr with halo left and right, x likewise
constexpr __host__ __device__ Shared transposed_shared(int taps) {
  const int height = kTileHeight + taps - 1, width = kTileWidth + taps - 1;
  const int first = 2 * taps, second = first + height * width, third = second + kTileHeight * width;
  return {first, second, third, third + kTileHeight * width};
}

static_assert(forward_shared(kMaxTaps).end * sizeof(double) <= 48 * 1024, "what every GPU gives without being asked");
static_assert(transposed_shared(kMaxTaps).end * sizeof(double) <= 48 * 1024, "likewise");

__host__ __device__ int64_t tiles_across(const Size& size) { return (size.width + kTileWidth - 1) / kTileWidth; }

__host__ __device__ int64_t tiles_of(const Size& size) {
  return (size.height + kTileHeight - 1) / kTileHeight * tiles_across(size);
}

// The block's tile: its plane, its first pixel, and the number of its part among the partial sums.
struct Tile {
  int64_t batch, channel, part;
  int row, column, height, width;  // height and width of the image

  explicit __device__ Tile(const Size& size)
      : height(static_cast<int>(size.height)), width(static_cast<int>(size.width)) {
    const int64_t tiles = tiles_of(size), plane = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    batch = plane / size.channels;
    channel = plane % size.channels;
    part = batch * tiles + tile;
    row = static_cast<int>(tile / tiles_across(size) * kTileHeight);
    column = static_cast<int>(tile % tiles_across(size) * kTileWidth);
  }

  // Whether pixel (i, j), counted from the tile's first one, is inside the image.
  __device__ bool has(int i, int j) const {
    return row + i >= 0 && row + i < height && column + j >= 0 && column + j < width;
  }
};

// One image and channel of (B, C, H, W), seen from the tile's first pixel.
template <typename T>
struct Plane {
  T* data;
  int64_t row_stride, column_stride;

  __device__ Plane(const Image& image, const Tile& tile)
      : data(static_cast<T*>(image.data) + tile.batch * image.batch + tile.channel * image.channel +
             tile.row * image.row + tile.column * image.column),
        row_stride(image.row),
        column_stride(image.column) {}

  __device__ T& at(int i, int j) const { return data[i * row_stride + j * column_stride]; }

  __device__ Accumulation<T> operator()(int i, int j) const { return static_cast<Accumulation<T>>(at(i, j)); }
};

// function(i, j) for each pixel of a rectangle, by all threads of the block together.
template <typename Function>
__device__ void for_each(int height, int width, Function function) {
  for (int i = threadIdx.y; i < height; i += kTileWarps) {
    for (int j = threadIdx.x; j < width; j += kWarp) function(i, j);
  }
}

// The plane's rectangle from (row, column) on, counted from the tile's first pixel; zeros outside the image.
template <typename T, typename A>
__device__ void load(A* rectangle, Plane<T> plane, const Tile& tile, int row, int column, int height, int width) {
  for_each(height, width, [&](int i, int j) {
    rectangle[i * width + j] = tile.has(row + i, column + j) ? plane(row + i, column + j) : A(0);
  });
}

template <typename T, typename A>
__device__ void load_weights(A* weights, const StripedConv& conv, int64_t channel) {
  const int taps = conv.taps;
  const T* row = static_cast<const T*>(conv.weight_row) + channel * taps;
  const T* col = static_cast<const T*>(conv.weight_col) + channel * taps;
  for_each(1, 2 * taps, [&](int, int k) { weights[k] = static_cast<A>(k < taps ? row[k] : col[k - taps]); });
}

// What the taps see, `step` elements from one to the next, weighted.
template <typename A>
__device__ A weighted(const A* weight, int taps, const A* seen, int step) {
  A sum = 0;
  for (int k = 0; k < taps; ++k) sum += weight[k] * seen[k * step];
  return sum;
}

// r of the tile and of K / 2 rows above and below, from which weighted(.., kTileWidth) makes s. Zero outside the image,
// where the column step does not see bias_row. Ends with a barrier.
template <typename T, typename A>
__device__ const A* row_step(A* shared, const StripedConv& conv, const Tile& tile) {
  const int taps = conv.taps, half = taps / 2, height = kTileHeight + 2 * half, width = kTileWidth + 2 * half;
  A* const x_tile = shared + forward_shared(taps).first;  // (height, width)
  A* const r = shared + forward_shared(taps).second;      // (height, kTileWidth)
  load_weights<T>(shared, conv, tile.channel);
  load(x_tile, Plane<const T>(conv.x, tile), tile, -half, -half, height, width);
  __syncthreads();
  const A bias = static_cast<A>(static_cast<const T*>(conv.bias_row)[tile.channel]);
  for_each(height, kTileWidth, [&](int i, int j) {
    const bool inside = tile.has(i - half, j);
    r[i * kTileWidth + j] = inside ? weighted(shared, taps, x_tile + i * width + j, 1) + bias : A(0);
  });
  __syncthreads();
  return r;
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks) striped_conv_forward(StripedConv conv, Image y_image) {
  using A = Accumulation<T>;
  DYNAMIC_SHARED(A, shared);
  const Tile tile(conv.size);
  const A* const r = row_step<T>(shared, conv, tile);
  const int taps = conv.taps;
  const A bias = static_cast<A>(static_cast<const T*>(conv.bias_col)[tile.channel]);
  const Plane<const T> gate(conv.gate, tile);
  const Plane<T> y(y_image, tile);
  for_each(kTileHeight, kTileWidth, [&](int i, int j) {
    if (!tile.has(i, j)) return;
    const A s = weighted(shared + taps, taps, r + i * kTileWidth + j, kTileWidth) + bias;
    const A activated = activate<T>(s, conv.activation);
    y.at(i, j) = static_cast<T>(conv.gate.data ? activated * gate(i, j) : activated);
  });
}

// For each tap the sum over the tile of `gradient` times what the tap sees, and the sum of `gradient`: one weight's and
// its bias's partial sums. A warp makes a sum at a time, a lane a column; so the order is always the same.
template <typename A>
__device__ void sum_tile(A* sums, int taps, const A* gradient, int gradient_pitch, const A* seen, int pitch, int step) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  for (int k = warp; k <= taps; k += kTileWarps) {
    A sum = 0;
    for (int i = 0; i < kTileHeight; ++i) {
      sum += gradient[i * gradient_pitch + lane] * (k < taps ? seen[i * pitch + lane + k * step] : A(1));
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(kAllLanes, sum, offset);
    if (lane == 0) sums[k] = sum;
  }
}

template <typename A>
__device__ A* partial_sums(void* partial, const StripedConv& conv, const Tile& tile) {
  return static_cast<A*>(partial) + (tile.part * conv.size.channels + tile.channel) * (2 * conv.taps + 2);
}

// dgate, ds, and the sums for weight_col and bias_col.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks)
    striped_conv_backward_pointwise(StripedConv conv, StripedConvGradients gradients, Image ds_image) {
  using A = Accumulation<T>;
  DYNAMIC_SHARED(A, shared);
  const Tile tile(conv.size);
  const A* const r = row_step<T>(shared, conv, tile);
  const int taps = conv.taps;
  A* const ds_tile = shared + forward_shared(taps).third;  // (kTileHeight, kTileWidth)
  const A bias = static_cast<A>(static_cast<const T*>(conv.bias_col)[tile.channel]);
  const Plane<const T> gate(conv.gate, tile), dy(gradients.dy, tile);
  const Plane<T> dgate(gradients.dgate, tile);
  const Plane<A> ds(ds_image, tile);
  for_each(kTileHeight, kTileWidth, [&](int i, int j) {
    A gradient = 0;
    if (tile.has(i, j)) {
      const A s = weighted(shared + taps, taps, r + i * kTileWidth + j, kTileWidth) + bias;
      gradient = dy(i, j);
      if (conv.gate.data) {
        dgate.at(i, j) = static_cast<T>(gradient * activate<T>(s, conv.activation));
        gradient *= gate(i, j);
      }
      gradient *= activation_slope(s, conv.activation);
      ds.at(i, j) = gradient;
    }
    ds_tile[i * kTileWidth + j] = gradient;
  });
  __syncthreads();
  A* const sums = partial_sums<A>(gradients.partial, conv, tile) + taps + 1;
  sum_tile(sums, taps, ds_tile, kTileWidth, r, kTileWidth, kTileWidth);
}

// dx, and the sums for weight_row and bias_row.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kBlocks)
    striped_conv_backward_transposed(StripedConv conv, StripedConvGradients gradients, Image ds_image) {
  using A = Accumulation<T>;
  DYNAMIC_SHARED(A, shared);
  const Tile tile(conv.size);
  const int taps = conv.taps, half = taps / 2, height = kTileHeight + 2 * half, width = kTileWidth + 2 * half;
  A* const ds_tile = shared + transposed_shared(taps).first;  // (height, width)
  A* const dr = shared + transposed_shared(taps).second;      // (kTileHeight, width)
  A* const x_tile = shared + transposed_shared(taps).third;   // (kTileHeight, width)
  const Plane<T> dx(gradients.dx, tile);
  load_weights<T>(shared, conv, tile.channel);
  load(ds_tile, Plane<const A>(ds_image, tile), tile, -half, -half, height, width);
  load(x_tile, Plane<const T>(conv.x, tile), tile, 0, -half, kTileHeight, width);
  __syncthreads();
  for_each(kTileHeight, width, [&](int i, int j) {  // taps in reverse: K - 1 rows further down is the first tap's
    const bool inside = tile.has(i, j - half);
    const A* const first = ds_tile + (i + taps - 1) * width + j;
    dr[i * width + j] = inside ? weighted(shared + taps, taps, first, -width) : A(0);
  });
  __syncthreads();
  for_each(kTileHeight, kTileWidth, [&](int i, int j) {
    const A* const first = dr + i * width + j + taps - 1;
    if (tile.has(i, j)) dx.at(i, j) = static_cast<T>(weighted(shared, taps, first, -1));
  });
  sum_tile(partial_sums<A>(gradients.partial, conv, tile), taps, dr + half, width, x_tile, width, 1);
}

int64_t blocks_of(const StripedConv& conv) {
  if (conv.taps > kMaxTaps) {
    throw std::runtime_error("striped_conv: " + std::to_string(conv.taps) + " taps, expected at most " +
                             std::to_string(kMaxTaps));
  }
  if (std::max(conv.size.height, conv.size.width) > INT32_MAX - kTileWidth - kMaxTaps) {
    throw std::runtime_error("striped_conv: an image of " + std::to_string(conv.size.height) + " x " +
                             std::to_string(conv.size.width) + ", expected sides below 2^31");
  }
  return conv.size.batch * conv.size.channels * tiles_of(conv.size);
}

constexpr dim3 kTileBlock(kWarp, kTileWarps);

}  // namespace

namespace seemore {

void striped_conv(const StripedConv& conv, const Image& y, void* stream) {
  if (can_walk(conv)) return walk_striped_conv(conv, y, nullptr, stream);
  const int64_t blocks = blocks_of(conv);
  if (blocks == 0) return;
  with_type(conv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto shared_bytes = forward_shared(conv.taps).third * sizeof(Accumulation<T>);
    LAUNCH(striped_conv_forward<T>, grid_of(blocks, "striped_conv"), kTileBlock, shared_bytes, stream, conv, y);
  });
}

StripedConvWorkspace striped_conv_workspace(const StripedConv& conv) {
  if (can_walk(conv)) return walk_striped_conv_workspace(conv);
  const Size& size = conv.size;
  return {size.batch * tiles_of(size), size.batch * size.channels * size.height * size.width};
}

void striped_conv_backward(const StripedConv& conv, const StripedConvGradients& gradients, void* stream) {
  if (can_walk(conv)) return walk_striped_conv_backward(conv, gradients, stream);
  const int64_t blocks = blocks_of(conv);
  if (blocks == 0) return;
  const Size& size = conv.size;
  const int64_t plane = size.height * size.width;
  const Image ds{gradients.scratch, size.channels * plane, plane, size.width, 1};
  const unsigned grid = grid_of(blocks, "striped_conv_backward");
  with_type(conv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto pointwise_bytes = forward_shared(conv.taps).end * sizeof(Accumulation<T>);
    const auto transposed_bytes = transposed_shared(conv.taps).end * sizeof(Accumulation<T>);
    LAUNCH(striped_conv_backward_pointwise<T>, grid, kTileBlock, pointwise_bytes, stream, conv, gradients, ds);
    LAUNCH(striped_conv_backward_transposed<T>, grid, kTileBlock, transposed_bytes, stream, conv, gradients, ds);
  });
}

}  // namespace seemore
