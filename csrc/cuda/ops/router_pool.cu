// The router's pool on CUDA: the sum of every plane over its pixels in parts, and its gradient. Figures: router.cu.
//
// A run is a range of adjacent elements: a plane, or an image whose channels come first (channels_last). Threads
// go through a run by vectors of 16 bytes, several of them on their way at a time. Their step is a multiple of the
// channels, so that a lane of a thread's vectors always meets the same channel.

#include <algorithm>
#include <numeric>

#include "cuda/common/access.h"
#include "params/router.h"

namespace {

using seemore::Image;
using seemore::Size;
using seemore::SizedImage;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlocks = 4;   // on a multiprocessor, at least: as many as the threads of sm_75 suffice for
constexpr int kAtATime = 4;  // vectors on their way to a thread
// Blocks for one image: four for each of an H200's 132 multiprocessors. Fewer where a block sums all channels, which
// leaves more for route to add up.
constexpr int64_t kPlaneBlocks = 132 * kBlocks, kImageBlocks = 132 * 3;

template <typename T>
constexpr int kLanes = 16 / sizeof(T);

// The cut of images for blocks. A run's elements are in rows of equal length.
struct Runs {
  int64_t channels;            // of a run: 1, or all, side by side
  int64_t length;              // of a run, in elements
  int64_t width, row, column;  // of a row, and strides; a dense run is one row
  int64_t span;                // a part's length in vectors, a multiple of the period of channels
  unsigned parts, count;       // of a run; runs of an image
  unsigned threads;            // of a block, those that work: their number is such a multiple, too
  bool whole;                  // vectors can be read and written at once
};

template <typename T>
Runs runs_of(const SizedImage& pooled) {
  const Size& size = pooled.size;
  const Image& image = pooled.image;
  constexpr int64_t kMostThreads = kThreads;
  const int64_t lanes = kLanes<T>, pixels = size.height * size.width;
  const auto is_dense = [&](int64_t step) {
    return (size.width == 1 || image.column == step) && (size.height == 1 || image.row == step * size.width);
  };
  const int64_t period = size.channels / std::gcd(size.channels, lanes);  // in vectors
  const bool side_by_side =
      size.channels > 1 && image.channel == 1 && is_dense(size.channels) && period <= kMostThreads;
  const bool dense = side_by_side || is_dense(1);

  Runs runs;
  runs.channels = side_by_side ? size.channels : 1;
  runs.length = pixels * runs.channels;
  runs.width = dense ? runs.length : size.width;
  runs.row = image.row;
  runs.column = dense ? 1 : image.column;
  runs.count = static_cast<unsigned>(size.channels / runs.channels);

  const int64_t repeat = side_by_side ? period : 1;
  const int64_t repeats = ceil_div(ceil_div(runs.length, lanes), repeat);
  const int64_t threads = kMostThreads / repeat * repeat;
  const int64_t wanted = side_by_side ? kImageBlocks : kPlaneBlocks / size.channels;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, ceil_div(repeats * repeat, kAtATime * threads)));
  runs.span = ceil_div(repeats, parts) * repeat;
  runs.parts = static_cast<unsigned>(parts);
  runs.threads = static_cast<unsigned>(threads);
  runs.whole = dense && reinterpret_cast<uintptr_t>(image.data) % 16 == 0 &&
               (size.batch == 1 || image.batch % lanes == 0) && (runs.count == 1 || image.channel % lanes == 0);
  return runs;
}

unsigned grid_of_runs(const Runs& runs, const Size& size, const char* kernel) {
  return grid_of(size.batch * (size.channels / runs.channels) * int64_t(runs.parts), kernel);
}

// The block's part of a run. Vectors are counted from the run's first one.
template <typename T, bool kWhole>
struct Part {
  const Runs& runs;
  T* data;                     // the run's first element
  int64_t image, channel;      // and where that is
  unsigned number;             // of the part
  int64_t first, whole, last;  // vectors: the thread's first, behind the last one that is whole, behind the last

  __device__ Part(const Runs& runs, const SizedImage& pooled) : runs(runs), number(blockIdx.x % runs.parts) {
    const unsigned run = blockIdx.x / runs.parts;
    image = run / runs.count;
    channel = run % runs.count;
    data = static_cast<T*>(pooled.image.data) + image * pooled.image.batch + channel * pooled.image.channel;
    const int64_t begin = number * runs.span, end = begin + runs.span;
    last = min(end, ceil_div(runs.length, kLanes<T>));
    whole = kWhole ? min(end, runs.length / kLanes<T>) : 0;
    first = threadIdx.x < runs.threads ? begin + threadIdx.x : last;
  }

  // function(lane, element) for each element of the thread's vectors that cannot be read or written at once.
  template <typename Function>
  __device__ void one_by_one(Function function) const {
    int64_t vector = first;
    if (kWhole) {  // the one that the run's end cuts
      const int64_t ahead = whole - first;
      if (ahead < 0 || ahead % runs.threads != 0) return;
      vector = whole;
    }
#pragma unroll 1
    for (; vector < last; vector += runs.threads) {
      const int64_t begin = vector * kLanes<T>;
      int64_t i = kWhole ? 0 : begin / runs.width, j = begin - i * runs.width;
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (begin + lane < runs.length) function(lane, data[i * runs.row + j * runs.column]);
        if (++j == runs.width) {
          j = 0;
          ++i;
        }
      }
    }
  }
};

// The order of summation is the same whether vectors are read at once or one by one.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, kWhole ? kBlocks : 3) pool_kernel(Runs runs, SizedImage a, void* partial) {
  using A = Accumulation<T>;
  constexpr int kCount = kLanes<T>;
  __shared__ A seen[kThreads * kCount];
  const Part<const T, kWhole> part(runs, a);
  A sum[kCount] = {};
  const int64_t step = runs.threads;
#pragma unroll 1
  for (int64_t vector = part.first; vector < part.whole; vector += kAtATime * step) {
    Words<T, kCount> loaded[kAtATime] = {};  // zeros change no sum
#pragma unroll
    for (int n = 0; n < kAtATime; ++n) {
      if (vector + n * step < part.whole) loaded[n] = load_words<kCount>(part.data + (vector + n * step) * kCount);
    }
#pragma unroll
    for (int n = 0; n < kAtATime; ++n) {
      const auto values = to_accum(loaded[n]);
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) sum[lane] += values.value[lane];
    }
  }
  part.one_by_one([&](int lane, T value) { sum[lane] += to_accum(value); });

  A* const to = static_cast<A*>(partial) + (part.number * a.size.batch + part.image) * a.size.channels + part.channel;
  if (runs.channels == 1) {
    A total = 0;
#pragma unroll
    for (int lane = 0; lane < kCount; ++lane) total += sum[lane];
    total = sum_of_warp(total);
    if (threadIdx.x % kWarp == 0) seen[threadIdx.x / kWarp] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < kWarps; ++warp) total += seen[warp];
    *to = total;
  } else {
#pragma unroll
    for (int lane = 0; lane < kCount; ++lane) seen[threadIdx.x * kCount + lane] = sum[lane];
    __syncthreads();
    const unsigned channels = static_cast<unsigned>(runs.channels);
    for (unsigned channel = threadIdx.x; channel < channels; channel += kThreads) {
      A total = 0;
      for (unsigned i = channel; i < runs.threads * kCount; i += channels) total += seen[i];
      to[channel] = total;
    }
  }
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 3) spread_kernel(Runs runs, SizedImage da, const void* dmean) {
  using A = Accumulation<T>;
  constexpr int kCount = kLanes<T>;
  const Part<T, kWhole> part(runs, da);
  const A* const from = static_cast<const A*>(dmean) + part.image * da.size.channels + part.channel;
  const A pixels = static_cast<A>(da.size.height * da.size.width);
  Pack<T, kCount> value;
#pragma unroll
  for (int lane = 0; lane < kCount; ++lane) {
    const unsigned channel = (threadIdx.x * kCount + lane) % static_cast<unsigned>(runs.channels);
    value.value[lane] = to_storage<T>(from[channel] / pixels);
  }
  for (int64_t vector = part.first; vector < part.whole; vector += runs.threads) {
    store_words(part.data + vector * kCount, Words<T, kCount>(value));
  }
  part.one_by_one([&](int lane, T& element) { element = value.value[lane]; });
}

}  // namespace

namespace seemore {

int64_t pool_parts(const SizedImage& a) {
  int64_t parts = 0;
  with_type(a.dtype, [&](auto zero) { parts = runs_of<decltype(zero)>(a).parts; });
  return parts;
}

void pool(const SizedImage& a, void* partial, void* stream) {
  if (a.size.batch == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Runs runs = runs_of<T>(a);
    const unsigned grid = grid_of_runs(runs, a.size, "router");
    if (runs.whole) {
      LAUNCH((pool_kernel<T, true>), grid, kThreads, 0, stream, runs, a, partial);
    } else {
      LAUNCH((pool_kernel<T, false>), grid, kThreads, 0, stream, runs, a, partial);
    }
  });
}

void spread(const SizedImage& da, const void* dmean, void* stream) {
  if (da.size.batch == 0) return;
  with_type(da.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Runs runs = runs_of<T>(da);
    const unsigned grid = grid_of_runs(runs, da.size, "router_backward");
    if (runs.whole) {
      LAUNCH((spread_kernel<T, true>), grid, kThreads, 0, stream, runs, da, dmean);
    } else {
      LAUNCH((spread_kernel<T, false>), grid, kThreads, 0, stream, runs, da, dmean);
    }
  });
}

}  // namespace seemore
