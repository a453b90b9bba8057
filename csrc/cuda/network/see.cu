// SEE with its LayerNorm and residual.
//
// A step computes rows of q, then their convolution along the row into a ring in shared memory, of as many rows as the
// convolution along the column takes. v is computed where it is used. Reads x and writes it: 160 bytes a pixel for 36
// channels.

#include "cuda/network/launches.h"
#include "cuda/network/rings.h"

namespace seemore::gpu {
namespace {

constexpr int kHalo = kTaps / 2;
constexpr int kRing = kStep + 2 * kHalo;
constexpr int kNorms = 4 * kStep;  // rows from the last of q to the first of the result, and a step more
constexpr int kRun = 8;            // columns that a thread convolves along a row, of two channels

struct Call {
  Walk walk;
  int channels;
  FeatureMemory x, y;
  GroupWeights weights;
};

// Of a row in the rings: odd, so that pixels of two rows lie in different banks.
__host__ __device__ constexpr int stride_of(int columns) { return columns + 1; }

template <int kChannels>
int64_t shared_bytes(int columns) {
  return Ring<kChannels, kStep>::bytes(stride_of(columns)) + Ring<kChannels, kRing>::bytes(stride_of(columns)) +
         kNorms * columns * int64_t(sizeof(Norm));
}

// The block's rings.
template <int kChannels>
struct Shared {
  Ring<kChannels, kStep> q;
  Ring<kChannels, kRing> rows;
  Norm* norms;  // [row][column]
  int columns;

  __device__ Shared(char* memory, int columns)
      : q(memory, stride_of(columns)),
        rows(memory + Ring<kChannels, kStep>::bytes(stride_of(columns)), stride_of(columns)),
        norms(reinterpret_cast<Norm*>(memory + Ring<kChannels, kStep>::bytes(stride_of(columns)) +
                                      Ring<kChannels, kRing>::bytes(stride_of(columns)))),
        columns(columns) {}
  // That of a pixel; row: at least -kNorms.
  __device__ Norm& norm(int row, int column) const { return norms[(row + kNorms) % kNorms * columns + column]; }
};

// Convolves kRun pixels along a row, of two channels, whose words lie kStride words apart, as do the taps, and the bias
// after them: from the first that is read, to the first result. Where there is no row, the result is 0.
template <int kStride>
__device__ void convolve_run(uint32_t* to, const uint32_t* from, const uint32_t* taps, bool is_row) {
  uint32_t sums[kRun], tap[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) tap[i] = taps[i * kStride];
#pragma unroll
  for (uint32_t& sum : sums) sum = taps[kTaps * kStride];
#pragma unroll
  for (int i = 0; i < kRun + kTaps - 1; ++i) {
    const uint32_t value = from[i * kStride];
#pragma unroll
    for (int o = 0; o < kRun; ++o) {
      if (i >= o && i - o < kTaps) sums[o] = multiply_add_pairs(tap[i - o], value, sums[o]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) to[i * kStride] = is_row ? sums[i] : 0;
}

// The convolution along the rows of q, of a step's rows from `row` of the band on and of kWords words of a pixel.
// Outside the image it is 0.
template <int kWords>
__device__ void convolve_rows(uint32_t* to, const uint32_t* q, const uint32_t* taps, const Call& call, const Part& part,
                              int row) {
  const int stride = stride_of(call.walk.columns), runs = (call.walk.inner + kRun - 1) / kRun, top = part.top;
  for (int item = forgotten(threadIdx.x); item < kStep * kWords * runs; item += blockDim.x) {
    const int word = item % kWords, line = item / kWords % kStep, begin = kHalo + item / kWords / kStep * kRun;
    const int from = Ring<kHead + 8, kStep>::place(line, begin - kHalo, stride);
    const int target = Ring<kHead + 8, kRing>::place(row + line, begin, stride), y = top + row + line;
    convolve_run<kWords>(to + target * kWords + word, q + from * kWords + word, taps + word,
                         y >= 0 && y < call.walk.height);
  }
}

// q of a step's rows from `row` of the band on.
template <class T, int kChannels>
__device__ void compute_q(const Shared<kChannels>& shared, const Call& call, const Part& part, int row) {
  const Unit unit(call.walk);
  row += part.top;
  if (row + unit.row + 1 < part.top - kHalo || row + unit.row >= part.bottom + kHalo) return;
  uint32_t words[kPixels][kWords<kChannels>];
  read_pixels(words, Features<kChannels>{call.x}, call.walk, part, unit, row);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const Norm norm = normalise<T>(words[p], call.channels);
    if (unit.lane.quarter > 0) continue;
    shared.norm(row - part.top + unit.row + Unit::row_of(p), unit.column_of(p)) = norm;
  }
  pointwise_gelu<T>(words, call.weights.q, call.weights.q_bias, unit);
  write_ring(shared.q, 0, words, call.walk, part, unit, row);
}

// The result, of a step's rows from `row` of the band on.
template <class T, int kChannels>
__device__ void finish(const Shared<kChannels>& shared, const Call& call, const Part& part, int row) {
  constexpr int kCount = kWords<kChannels>;
  const Unit unit(call.walk);
  row += part.top;
  if (row < part.top || row + unit.row >= part.bottom) return;
  const Features<kChannels> x{call.x}, y{call.y};
  uint32_t v[kPixels][kCount];
  read_pixels(v, x, call.walk, part, unit, row);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    normalise<T>(v[p], shared.norm(row - part.top + unit.row + Unit::row_of(p), unit.column_of(p)));
  }
  pointwise_gelu<T>(v, call.weights.v, call.weights.v_bias, unit);
  uint32_t convolved[kPixels][kCount];
  depthwise_with_bias<kTaps, 1>(convolved, shared.rows, call.weights.column, part, unit, row);
  multiply_all(v, convolved);
  float sums[kPixels][kCount][2];
  pointwise(sums, v, call.weights.project, call.weights.project_bias, unit);
  read_pixels(v, x, call.walk, part, unit, row);
  add_to<T, false>(v, sums);
  write_own(y, v, call.walk, part, unit, row);
}

template <class T, int kChannels>
__global__ void __launch_bounds__(threads_of(most_columns(kChannels)), blocks_of(kChannels))
    see_kernel(const __grid_constant__ Call call) {
  DYNAMIC_SHARED(char, memory);
  __shared__ Part part;
  const Walk& walk = call.walk;
  part.find(walk);
  const Shared<kChannels> shared(memory, walk.columns);

  for (int row = -3 * kStep; row < walk.rows; row += kStep) {
    compute_q<T>(shared, call, part, row + kHalo);
    __syncthreads();
    constexpr int kHeadWords = kHead / 2;
    const auto taps = Features<kChannels>::at(call.weights.row, kTaps + 1);
    convolve_rows<kHeadWords>(shared.rows.features.head, shared.q.features.head, taps.head, call, part, row + kHalo);
    convolve_rows<kChannels / 2 - kHeadWords>(shared.rows.features.tail, shared.q.features.tail, taps.tail, call, part,
                                              row + kHalo);
    __syncthreads();
    finish<T>(shared, call, part, row);
  }
}

}  // namespace

void launch_see(const Scene& scene, const GroupWeights& weights) {
  with_features(static_cast<DType>(scene.config().dtype), scene.channels(), [&](auto type, auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    const int columns = columns_of(most_columns(kChannels), shared_bytes<kChannels>);
    const Walk walk = plan_walk(scene.net.size, scene.rows, columns, kHalo, kHalo, 2 * kHalo);
    const Call call{walk, scene.channels(), scene.features<kChannels>(scene.buffers.x[1]),
                    scene.features<kChannels>(scene.buffers.x[0]), weights};
    LAUNCH_LARGE((see_kernel<decltype(type), kChannels>), grid_of(walk.blocks(), "network"), walk.threads(),
                 shared_bytes<kChannels>(columns), scene.stream, call);
  });
}

}  // namespace seemore::gpu
