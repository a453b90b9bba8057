// calibrate's gradients on CUDA, from the gradient of depthwise 3x3's result to k's and weight_agg's.
//
// 1. descend: from one aggregation to the one before it, for recursive > 2.
// 2. spread: from there to k. Reads dy and k once, writes dk. A warp has patches of 4x4 pixels side by side, that is
//    128 columns of 4 rows, and asks for the next ones before it works on these.

#include <utility>

#include "cuda/ops/calibrate_kernels.h"

namespace {

using namespace calibrating;
using seemore::CalibrateGradients;

constexpr int kPatchRows = 4, kMostEach = 16;

// Adds up a block's sums for weight_agg's 16 taps, of which lanes l and l + 16 have number l's, and for bias_agg.
template <typename A>
__device__ void store_sums(A* partial, A tap_sum, A bias_sum) {
  __shared__ A seen[kPatchRows][16 + 1];
  if (threadIdx.x < 16) seen[threadIdx.y][threadIdx.x] = tap_sum;
  if (threadIdx.x == 16) seen[threadIdx.y][16] = bias_sum;
  __syncthreads();
  if (threadIdx.y > 0 || threadIdx.x > 16) return;
  A sum = 0;
#pragma unroll
  for (int warp = 0; warp < kPatchRows; ++warp) sum += seen[warp][threadIdx.x];
  partial[threadIdx.x] = sum;
}

// An aggregation's map before GELU, and its gradient: known, or that of GELU of it, through depthwise 3x3.
template <typename A>
struct Level {
  Map<const A> map;
  const A* gradient;
  bool is_last;

  template <typename T>
  __device__ A at(const Calibrate& inputs, const Plane& plane, int row, int column) const {
    const int64_t first = map.of(plane) - map.data, here = int64_t(row) * map.width + column;
    if (!is_last) return gradient[first + here];
    const T* const weight = static_cast<const T*>(inputs.weight_dw) + plane.channel * 9;
    return depthwise<true>(gradient + first, row, column, map.height, map.width, weight) *
           gelu_slope(map.data[first + here]);
  }
};

// A block has a plane, a thread one tap of it.
template <typename T, typename A = Accumulation<T>>
__global__ void __launch_bounds__(kPatchRows* kWarp)
    calibrate_descend(Calibrate inputs, Level<A> level, Map<const A> below, A* gradient, A* partial) {
  const Plane plane(blockIdx.x, inputs.size.channels);
  const int64_t first = below.of(plane) - below.data;
  const int tap = threadIdx.x % 16;
  const A weight = to_accum(static_cast<const T*>(inputs.weight_agg)[plane.channel * 16 + tap]);
  A tap_sum = 0, bias_sum = 0;
  for (int64_t pixel = (threadIdx.y * kWarp + threadIdx.x) / 16; pixel < level.map.plane();
       pixel += kPatchRows * kWarp / 16) {
    const int row = static_cast<int>(pixel / level.map.width), column = static_cast<int>(pixel % level.map.width);
    const A here = level.template at<T>(inputs, plane, row, column);
    const int64_t at = first + (int64_t(row) * 4 + tap / 4) * below.width + column * 4 + tap % 4;
    gradient[at] = weight * here * gelu_slope(below.data[at]);
    tap_sum += here * gelu(below.data[at]);
    if (tap == 0) bias_sum += here;
  }
  tap_sum += __shfl_xor_sync(kAllLanes, tap_sum, 16);
  store_sums(partial + blockIdx.x * 17, tap_sum, sum_lanes(bias_sum));
}

// The input of a thread of spread: 4 x 4 pixels of an element of the first aggregation, or of one beyond it.
template <typename T, int kVector>
struct Patch {
  int row, column;  // of the first aggregation
  bool is_seen;     // is there that element?
  Words<T, 4> dy[4], k[4];

  // Pixels outside of the image, and k that no element aggregates, are 0.
  __device__ Patch(const Calibrate& inputs, const Items& items, const Image& dy_image, const Plane& plane, int item,
                   int height, int width)
      : row(item / items.across * 4 + threadIdx.y), column(item % items.across) {
    is_seen = row < height && column < width;
    const T *const dy_from = from<const T>(dy_image, plane), *const k_from = from<const T>(inputs.k, plane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dy[i] = load<kVector, 4>(dy_from + i * dy_image.row, there(inputs, i));
      k[i] = load<kVector, 4>(k_from + i * inputs.k.row, is_seen ? 4 : 0);
    }
  }

  // Where the image has the patch's first pixel.
  template <typename Element>
  __device__ Element* from(const Image& image, const Plane& plane) const {
    return plane.of<Element>(image) + row * int64_t(4) * image.row + column * 4;
  }

  // Pixels from the patch's first column on.
  __device__ int there(const Calibrate& inputs, int i) const {
    return row * int64_t(4) + i < inputs.size.height ? static_cast<int>(inputs.size.width) - column * 4 : 0;
  }
};

// Blocks of spread on a multiprocessor, at least: as many as no kernel spills for.
template <typename T, int kVector>
constexpr int kBlocks = sizeof(T) == 8 ? 2
                        : kVector > 1  ? 4
                                       : 3;

// A warp is one of the 4 rows of the first aggregation that an element of the second sees: a thread is one of its taps.
template <typename T, int kLevels, int kVector, typename A = Accumulation<T>>
__global__ void __launch_bounds__(kPatchRows* kWarp, kBlocks<T, kVector>)
    calibrate_spread(Calibrate inputs, Items items, Map<const A> one, Level<A> level, Image dy, Image dk, A* partial) {
  __shared__ A seconds[kMostEach * kWarp / 4];  // the second aggregation's gradient
  const Plane plane(blockIdx.x / items.blocks, inputs.size.channels);
  const int block = static_cast<int>(blockIdx.x % items.blocks), first = block * items.each * kWarp;
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  const auto patch_of = [&](int n) {
    return Patch<T, kVector>(inputs, items, dy, plane, first + n * kWarp + threadIdx.x, one.height, one.width);
  };
  constexpr bool kAhead = sizeof(T) < 8;  // of float64 there are registers for one patch only
  auto next = patch_of(0);
  const T* const all_weights = static_cast<const T*>(inputs.weight_agg) + plane.channel * 16;
  A weight[16], sums[16] = {}, second_sum = 0, bias_sum = 0;
#pragma unroll
  for (int tap = 0; tap < 16; ++tap) weight[tap] = to_accum(all_weights[tap]);
  const int second_tap = threadIdx.y * 4 + threadIdx.x % 4;
  const A second_weight = to_accum(all_weights[second_tap]);
  if (kLevels == 2) {
    if (thread < items.each * kWarp / 4) {
      const int row = (first / 4 + thread) / (items.across / 4), column = (first / 4 + thread) % (items.across / 4);
      const bool exists = row < level.map.height && column < level.map.width;
      const A second = exists ? level.template at<T>(inputs, plane, row, column) : A(0);
      seconds[thread] = second;
      bias_sum += second;
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int n = 0; n < items.each; ++n) {
    const auto patch = next;
    if (kAhead && n + 1 < items.each) next = patch_of(n + 1);
    A gradient = 0;
    if (patch.is_seen && kLevels == 1) gradient = level.template at<T>(inputs, plane, patch.row, patch.column);
    if (patch.is_seen && kLevels == 2) {
      const A s = one.of(plane)[int64_t(patch.row) * one.width + patch.column];
      const A second = seconds[n * (kWarp / 4) + threadIdx.x / 4];
      gradient = second_weight * second * gelu_slope(s);
      second_sum += second * gelu(s);
    }
    bias_sum += gradient;
    T* const dk_to = patch.template from<T>(dk, plane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto k = to_accum(patch.k[i]);
      auto result = to_accum(patch.dy[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[4 * i + j] += gradient * k.value[j];
        result.value[j] += weight[4 * i + j] * gradient;
      }
      store<kVector>(dk_to + i * dk.row, patch.there(inputs, i), to_storage<T>(result));
    }
    if (!kAhead && n + 1 < items.each) next = patch_of(n + 1);
  }
  if (kLevels == 2) {
#pragma unroll
    for (int tap = 0; tap < 16; ++tap) sums[tap] += tap == second_tap ? second_sum : A(0);
  }
  const A tap_sum = sum_lanes(sums);
  const int64_t part = plane.batch * items.blocks + block;
  store_sums(partial + (part * inputs.size.channels + plane.channel) * 17, tap_sum, sum_lanes(bias_sum));
}

constexpr int64_t kAtOnce = 132 * 4;  // blocks that an H200 runs at once

// As many patches for a thread as take the least time, counted in patches: blocks take turns, and each of them has some
// work besides its patches. It depends on the size alone, so that sums do not depend on the GPU.
Items patches_of(const Calibrate& inputs) {
  constexpr int64_t kBesides = 2;
  const int64_t across = ceil_div(inputs.size.width, 16) * 4, down = ceil_div(inputs.size.height, 16);
  const int64_t warps = ceil_div(across * down, kWarp), planes = inputs.size.batch * inputs.size.channels;
  const auto time = [&](int64_t each) { return ceil_div(ceil_div(warps, each) * planes, kAtOnce) * (each + kBesides); };
  int64_t best = 1;
  for (int64_t each = 2; each <= std::min<int64_t>(warps, kMostEach); ++each) {
    if (time(each) < time(best)) best = each;
  }
  return {across, down, static_cast<int>(best), kWarp};
}

template <typename T>
void backward(const Calibrate& inputs, const CalibrateGradients& gradients, const void* unmixed, void* scratch,
              void* stream) {
  using A = Accumulation<T>;
  const int64_t planes = inputs.size.batch * inputs.size.channels, recursive = inputs.recursive;
  const auto level = [&](int64_t number) { return level_of<const A>(inputs, gradients.maps, number); };
  const dim3 block(kWarp, kPatchRows);
  const Items items = patches_of(inputs);
  const auto partial = static_cast<A*>(gradients.partial_agg);

  Level<A> from{level(recursive), static_cast<const A*>(unmixed), true};
  A *free = static_cast<A*>(scratch), *next_partial = partial + planes * items.blocks * 17;
  for (int64_t number = recursive; number > 2; --number) {
    const auto map = level(number - 1);
    A* const gradient = std::exchange(free, free + inputs.size.channels * map.pixels());
    LAUNCH(calibrate_descend<T>, grid_of(planes, "calibrate_backward"), block, 0, stream, inputs, from, map, gradient,
           next_partial);
    next_partial += planes * 17;
    from = {map, gradient, false};
  }

  const auto grid = grid_of(planes * items.blocks, "calibrate_backward");
  const int vector_size = vector_of({inputs.k, gradients.dy, gradients.dk}, inputs.size.width, sizeof(T));
  with_vector(vector_size, [&](auto vector) {
    if (recursive == 1) {
      LAUNCH((calibrate_spread<T, 1, vector>), grid, block, 0, stream, inputs, items, level(1), from, gradients.dy,
             gradients.dk, partial);
    } else {
      LAUNCH((calibrate_spread<T, 2, vector>), grid, block, 0, stream, inputs, items, level(1), from, gradients.dy,
             gradients.dk, partial);
    }
  });
}

}  // namespace

namespace calibrating {

int64_t spread_parts(const Calibrate& inputs) {
  const int64_t levels = inputs.recursive > 2 ? inputs.recursive - 2 : 0;
  return inputs.size.batch * (patches_of(inputs).blocks + levels);
}

int64_t spread_scratch(const Calibrate& inputs) {
  int64_t elements = 0;
  for (int64_t level = 2; level < inputs.recursive; ++level) elements += level_size(inputs, level).elements();
  return elements;
}

void spread(const Calibrate& inputs, const CalibrateGradients& gradients, const void* unmixed, void* scratch,
            void* stream) {
  with_type(inputs.dtype, [&](auto zero) { backward<decltype(zero)>(inputs, gradients, unmixed, scratch, stream); });
}

}  // namespace calibrating
