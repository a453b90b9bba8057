// router on CUDA: mean over the pixels, softmax(weight @ mean), the top_k most probable experts; and its gradients.
//
// pool reads every image once; all else is a few numbers per image. For (1, 36, 480, 640) in bfloat16 that is 22.1 MB
// and 11 million additions: a floor of 5.1 us at 4.3 TB/s. Predicted, not yet run on a GPU: pool 6.5 us, route 2.5 us,
// with the gap between two launches of a CUDA graph 10 us in all. Backward: a tiny launch, then spread, which writes
// as many bytes: 10 us, too.
// ptxas for sm_90, 16-bit and float32: pool 62 or 48 registers and 8 or 4 KB of shared memory, spread 44, route 40 and
// 2 KB + 4 (C + E) bytes, its gradient 48 and 1 KB. float64: at most 80 registers. Nothing spills.
//
// What lies side by side in memory is a run: a plane, or an image whose channels come first (channels_last). Threads
// go through a run by vectors of 16 bytes, several of them on their way at a time. Their step is a multiple of the
// channels, so that a lane of a thread's vectors always meets the same channel.

#include <algorithm>
#include <numeric>

#include "launch.h"
#include "router.h"
#include "types.h"

namespace {

using seemore::DType;
using seemore::Image;
using seemore::Pooled;
using seemore::Routed;
using seemore::Routing;
using seemore::RoutingGradients;
using seemore::Size;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlocks = 4;   // on a multiprocessor, at least: as many as the threads of sm_75 suffice for
constexpr int kAtATime = 4;  // vectors on their way to a thread
// Blocks for one image: four for each of an H200's 132 multiprocessors. Fewer where a block sums all channels, which
// leaves more for route to add up.
constexpr int64_t kPlaneBlocks = 132 * kBlocks, kImageBlocks = 132 * 3;

template <typename T>
constexpr int kLanes = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T lane[kLanes<T>];
};

constexpr __host__ __device__ int64_t quotient(int64_t count, int64_t each) { return (count + each - 1) / each; }

// How blocks share images out. A run's elements are in lines of equal length.
struct Runs {
  int64_t channels;            // of a run: 1, or all, side by side
  int64_t length;              // of a run, in elements
  int64_t width, row, column;  // of a line, and strides; all of a run that is dense is one line
  int64_t span;                // a part's length in vectors, a multiple of what the channels repeat after
  unsigned parts, count;       // of a run; runs of an image
  unsigned threads;            // of a block, those that work: their number is such a multiple, too
  bool whole;                  // vectors can be read and written at once
};

template <typename T>
Runs runs_of(const Pooled& pooled) {
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
  const int64_t repeats = quotient(quotient(runs.length, lanes), repeat);
  const int64_t threads = kMostThreads / repeat * repeat;
  const int64_t wanted = side_by_side ? kImageBlocks : kPlaneBlocks / size.channels;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, quotient(repeats * repeat, kAtATime * threads)));
  runs.span = quotient(repeats, parts) * repeat;
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

  __device__ Part(const Runs& runs, const Pooled& pooled) : runs(runs), number(blockIdx.x % runs.parts) {
    const unsigned run = blockIdx.x / runs.parts;
    image = run / runs.count;
    channel = run % runs.count;
    data = static_cast<T*>(pooled.image.data) + image * pooled.image.batch + channel * pooled.image.channel;
    const int64_t begin = number * runs.span, end = begin + runs.span;
    last = min(end, quotient(runs.length, kLanes<T>));
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

template <typename A>
__device__ A sum_of_warp(A value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// The order of summation is the same whether vectors are read at once or one by one.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, kWhole ? kBlocks : 3) pool_kernel(Runs runs, Pooled a, void* partial) {
  using A = Accumulation<T>;
  constexpr int kCount = kLanes<T>;
  __shared__ A seen[kThreads * kCount];
  const Part<const T, kWhole> part(runs, a);
  A sum[kCount] = {};
  const int64_t step = runs.threads;
#pragma unroll 1
  for (int64_t vector = part.first; vector < part.whole; vector += kAtATime * step) {
    const auto* const from = reinterpret_cast<const uint4*>(part.data) + vector;
    uint4 loaded[kAtATime];
#pragma unroll
    for (int n = 0; n < kAtATime; ++n) {
      loaded[n] = vector + n * step < part.whole ? from[n * step] : uint4{};  // zeros change no sum
    }
#pragma unroll
    for (int n = 0; n < kAtATime; ++n) {
      const auto& values = reinterpret_cast<const Vector<T>&>(loaded[n]);
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) sum[lane] += widen(values.lane[lane]);
    }
  }
  part.one_by_one([&](int lane, T value) { sum[lane] += widen(value); });

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
__global__ void __launch_bounds__(kThreads, 3) spread_kernel(Runs runs, Pooled da, const void* dmean) {
  using A = Accumulation<T>;
  constexpr int kCount = kLanes<T>;
  const Part<T, kWhole> part(runs, da);
  const A* const from = static_cast<const A*>(dmean) + part.image * da.size.channels + part.channel;
  const A pixels = static_cast<A>(da.size.height * da.size.width);
  Vector<T> value;
#pragma unroll
  for (int lane = 0; lane < kCount; ++lane) {
    const unsigned channel = (threadIdx.x * kCount + lane) % static_cast<unsigned>(runs.channels);
    value.lane[lane] = narrow<T>(from[channel] / pixels);
  }
  for (int64_t vector = part.first; vector < part.whole; vector += runs.threads) {
    reinterpret_cast<uint4*>(part.data)[vector] = reinterpret_cast<const uint4&>(value);
  }
  part.one_by_one([&](int lane, T& element) { element = value.lane[lane]; });
}

// Sums value(row, column) over the rows, kLoads of them at a time, and hands each column's to store(column, sum).
// Threads that go through the rows in turn are as many as fit beside one another, at most one per row; their sums are
// added in their order. For all threads of the block; ends with a barrier.
template <int kLoads, int kBlock, typename A, typename Value, typename Store>
__device__ void sum_rows(A (&seen)[kBlock], int64_t rows, int64_t columns, Value value, Store store) {
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int width = static_cast<int>(min(columns - first, int64_t(kBlock)));
    const int teams = static_cast<int>(min(int64_t(kBlock / width), rows)), team = threadIdx.x / width;
    const int64_t column = first + threadIdx.x % width;
    A sum = 0;
    for (int64_t row = team; team < teams && row < rows; row += kLoads * teams) {
      A loaded[kLoads];
#pragma unroll
      for (int n = 0; n < kLoads; ++n) loaded[n] = row + n * teams < rows ? value(row + n * teams, column) : A(0);
#pragma unroll
      for (int n = 0; n < kLoads; ++n) sum += loaded[n];
    }
    seen[threadIdx.x] = sum;
    __syncthreads();
    if (team == 0) {
      for (int other = 1; other < teams; ++other) sum += seen[other * width + threadIdx.x];
      store(column, sum);
    }
    __syncthreads();
  }
}

constexpr int kRouteThreads = 512;
constexpr int64_t kMostShared = 40 * 1024;  // beside sum_rows' 4 KB, in what every GPU gives without being asked

// The order of experts: by probability, and the lower index first. NaN is larger than all, as for torch.topk. A total
// order, so that the ranks are all different, whatever the probabilities.
template <typename A>
__device__ bool precedes(A p, int64_t expert, A other_p, int64_t other) {
  const bool is_nan = p != p, other_is_nan = other_p != other_p;
  if (is_nan || other_is_nan) return is_nan && (!other_is_nan || expert < other);
  return p > other_p || (p == other_p && expert < other);
}

// A block has an image. Its means and probabilities are in shared memory; where they do not fit, in the results.
template <typename A, typename W>
__global__ void __launch_bounds__(kRouteThreads) route_kernel(Routing routing, Routed routed, bool is_shared) {
  DYNAMIC_SHARED(A, shared);
  __shared__ A seen[kRouteThreads];
  const int64_t image = blockIdx.x, channels = routing.channels, experts = routing.experts;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const A* const partial = static_cast<const A*>(routed.partial) + image * channels;
  const W* const weight = static_cast<const W*>(routing.weight);
  A* const mean_result = routed.mean ? static_cast<A*>(routed.mean) + image * channels : nullptr;
  A* const result = static_cast<A*>(routed.probability) + image * experts;
  A* const p = is_shared ? shared : result;
  const A* mean = partial;
  if (mean_result) {
    A* const kept = is_shared ? shared + experts : mean_result;
    const A pixels = static_cast<A>(routed.pixels);
    const auto value = [&](int64_t part, int64_t channel) {
      return partial[part * routing.batch * channels + channel];
    };
    sum_rows<8>(seen, routed.parts, channels, value,
                [&](int64_t channel, A sum) { mean_result[channel] = kept[channel] = sum / pixels; });
    mean = kept;
  }

  for (int64_t expert = warp; expert < experts; expert += kRouteThreads / kWarp) {
    A logit = 0;
    for (int64_t channel = lane; channel < channels; channel += kWarp) {
      logit += static_cast<A>(widen(weight[expert * channels + channel])) * mean[channel];
    }
    logit = sum_of_warp(logit);
    if (lane == 0) p[expert] = logit;
  }
  __syncthreads();

  // Every warp finds the same two numbers: that takes no barrier.
  A largest = p[0], total = 0;
  for (int64_t expert = lane; expert < experts; expert += kWarp) largest = fmax(largest, p[expert]);
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  }
  for (int64_t expert = lane; expert < experts; expert += kWarp) total += exp(p[expert] - largest);
  total = sum_of_warp(total);
  __syncthreads();
  for (int64_t expert = threadIdx.x; expert < experts; expert += kRouteThreads) {
    result[expert] = p[expert] = exp(p[expert] - largest) / total;
  }
  __syncthreads();

  for (int64_t expert = threadIdx.x; expert < experts; expert += kRouteThreads) {
    const A own = p[expert];
    int64_t rank = 0;
    for (int64_t other = 0; other < experts; ++other) rank += precedes(p[other], other, own, expert);
    if (rank < routing.top_k) {
      routed.expert_index[image * routing.top_k + rank] = expert;
      static_cast<A*>(routed.expert_weight)[image * routing.top_k + rank] = own;
    }
  }
}

// Softmax's gradient for one image and expert: p (dp - sum of dp p), where dp is 0 for experts that were not chosen.
template <typename A>
__device__ A logit_gradient(const Routing& routing, const RoutingGradients& gradients, int64_t image, int64_t expert) {
  const A* const p = static_cast<const A*>(gradients.probability) + image * routing.experts;
  const A* const dp = static_cast<const A*>(gradients.dexpert_weight) + image * gradients.image_stride;
  const int64_t* const index = gradients.expert_index + image * routing.top_k;
  A own = 0, sum = 0;
  for (int64_t choice = 0; choice < routing.top_k; ++choice) {
    const A gradient = dp[choice * gradients.choice_stride];
    const int64_t chosen = index[choice];
    sum += gradient * p[chosen];
    if (chosen == expert) own = gradient;
  }
  return p[expert] * (own - sum);
}

// The first blocks have an image each, for its row of dmean; the others an expert, for its row of dweight.
template <typename A, typename W>
__global__ void __launch_bounds__(kThreads) route_backward_kernel(Routing routing, RoutingGradients gradients) {
  __shared__ A seen[kThreads];
  const int64_t channels = routing.channels;
  if (blockIdx.x < routing.batch) {
    const int64_t image = blockIdx.x;
    const W* const weight = static_cast<const W*>(routing.weight);
    A* const dmean = static_cast<A*>(gradients.dmean) + image * channels;
    const auto value = [&](int64_t expert, int64_t channel) {
      return logit_gradient<A>(routing, gradients, image, expert) *
             static_cast<A>(widen(weight[expert * channels + channel]));
    };
    sum_rows<1>(seen, routing.experts, channels, value, [&](int64_t channel, A sum) { dmean[channel] = sum; });
  } else {
    const int64_t expert = blockIdx.x - routing.batch;
    const A* const mean = static_cast<const A*>(gradients.mean);
    W* const dweight = static_cast<W*>(gradients.dweight) + expert * channels;
    const auto value = [&](int64_t image, int64_t channel) {
      return logit_gradient<A>(routing, gradients, image, expert) * mean[image * channels + channel];
    };
    sum_rows<1>(seen, routing.batch, channels, value,
                [&](int64_t channel, A sum) { dweight[channel] = narrow<W>(static_cast<Accumulation<W>>(sum)); });
  }
}

// function(0 of the wide type, 0 of the weights' type)
template <typename Function>
void with_types(const Routing& routing, Function function) {
  with_type(routing.weight_dtype, [&](auto weight) {
    routing.wide == DType::float64 ? function(double(), weight) : function(float(), weight);
  });
}

}  // namespace

namespace seemore {

int64_t pool_parts(const Pooled& a) {
  int64_t parts = 0;
  with_type(a.dtype, [&](auto zero) { parts = runs_of<decltype(zero)>(a).parts; });
  return parts;
}

void pool(const Pooled& a, void* partial, void* stream) {
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

void spread(const Pooled& da, const void* dmean, void* stream) {
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

void route(const Routing& routing, const Routed& routed, void* stream) {
  if (routing.batch == 0) return;
  with_types(routing, [&](auto wide, auto weight) {
    using A = decltype(wide);
    using W = decltype(weight);
    const int64_t bytes = (routing.experts + routing.channels) * sizeof(A);
    const bool is_shared = bytes <= kMostShared;
    LAUNCH((route_kernel<A, W>), grid_of(routing.batch, "router"), kRouteThreads, is_shared ? bytes : 0, stream,
           routing, routed, is_shared);
  });
}

void route_backward(const Routing& routing, const RoutingGradients& gradients, void* stream) {
  with_types(routing, [&](auto wide, auto weight) {
    using A = decltype(wide);
    using W = decltype(weight);
    const unsigned grid = grid_of(routing.batch + routing.experts, "router_backward");
    LAUNCH((route_backward_kernel<A, W>), grid, kThreads, 0, stream, routing, gradients);
  });
}

}  // namespace seemore
