// How a warp holds features: 16 pixels at a time, as mma.sync m16n8k16 takes and gives them.
//
// A quad of lanes has two pixels; each of its lanes has a quarter of their channels, in pairs: words of 32 bits while
// they are 16 bits wide, two floats while they are sums. The results of one product so are the operand of the next, in
// the same registers. The order of channels within a product is ours to choose (the weights are packed in it), and is
// such that a lane's words are neighbours in memory: lane t of a quad has channels 8 t to 8 t + 7 of the first 32 and
// the t-th quarter of the others.
#pragma once

#include "cuda/common/types.h"

namespace seemore::gpu {

constexpr int kHead = 32;  // channels of the first part

// Channels as they are padded: those of kernels.
template <int kChannels>
constexpr int kWords = kChannels / 8;  // of a lane and pixel

// The first channel of word `word`; lane: of a quad.
__host__ __device__ constexpr int channel_of(int channels, int word, int lane) {
  return word < kHead / 8 ? 8 * lane + 2 * word : kHead + (channels - kHead) / 4 * lane + 2 * (word - kHead / 8);
}

struct Lane {
  int pixel = threadIdx.x % kWarp / 4;  // and pixel + 8, of 16
  int quarter = threadIdx.x % 4;
};

// Numbers within kernels: operands of products and of stencils. A network of bfloat16 has them, too: they are the more
// accurate ones, and their arithmetic is that of pairs. What lies between kernels is of the network's type T, but for a
// and the ranks.
using Operand = __half;

// Two numbers of type T in a word; in float16, those beyond its largest become that.
template <class T>
__device__ uint32_t pack_pair(float first, float second) {
  uint32_t word;
  if constexpr (!std::is_same_v<T, __half>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
  } else {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
    constexpr float kLargest = 65504;
    for (float* number : {&first, &second}) {
      if (fabsf(*number) > kLargest) *number = copysignf(kLargest, *number);
    }
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
#endif
  }
  return word;
}

template <class T>
__device__ void unpack_pair(float (&pair)[2], uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 narrow;
    memcpy(static_cast<void*>(&narrow), &word, sizeof(word));
    pair[0] = __low2float(narrow), pair[1] = __high2float(narrow);
  } else {  // the upper half of a float
    const uint32_t bits[2] = {word << 16, word & 0xffff0000};
    memcpy(pair, bits, sizeof(bits));
  }
}

// a b + c, of both numbers of words.
__device__ inline uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  return cuda_host::multiply_add_pairs(a, b, c);
#endif
}

__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return cuda_host::multiply_add_pairs(a, b, 0);
#endif
}

// tanh of both numbers, within 2^-11 of it.
__device__ inline uint32_t hyperbolic_tangents(uint32_t x) {
#ifdef __CUDACC__
  uint32_t result;
  asm("tanh.approx.f16x2 %0, %1;" : "=r"(result) : "r"(x));
  return result;
#else
  float pair[2];
  unpack_pair<Operand>(pair, x);
  return pack_pair<Operand>(tanhf(pair[0]), tanhf(pair[1]));
#endif
}

// Four matrices of 8 x 8 numbers in shared memory: `row` is that of the lane's eighth of the warp. A lane gets the word
// that it has of an operand of rows.
__device__ inline void read_matrices(uint32_t& first, uint32_t& second, uint32_t& third, uint32_t& fourth,
                                     const uint32_t* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(first), "=r"(second), "=r"(third), "=r"(fourth)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  cuda_host::read_matrices({&first, &second, &third, &fourth}, row);
#endif
}

// sums = start + a b: 16 pixels, 16 inputs (8 where kInputs is 8), 8 outputs. first, second: of the lane's pixels; a:
// words of the first, of the second, and so on.
template <class T, int kInputs>
__device__ void multiply_add(float (&first)[2], float (&second)[2], const uint32_t (&a)[kInputs / 4],
                             const uint32_t (&b)[kInputs / 8], const float (&first_start)[2],
                             const float (&second_start)[2]) {
#if !defined(__CUDACC__)
  cuda_host::multiply_add<T, kInputs>(first, second, a, b, first_start, second_start);
#elif __CUDA_ARCH__ >= 800
#define SEEMORE_MMA(shape, type, operands, ...)                                                                        \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, " operands ", {%4, %5, %6, %7};" \
      : "=f"(first[0]), "=f"(first[1]), "=f"(second[0]), "=f"(second[1])                                               \
      : "f"(first_start[0]), "f"(first_start[1]), "f"(second_start[0]), "f"(second_start[1]), __VA_ARGS__)
  if constexpr (kInputs == 16 && std::is_same_v<T, __half>) {
    SEEMORE_MMA("m16n8k16", "f16", "{%8, %9, %10, %11}, {%12, %13}", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                "r"(b[0]), "r"(b[1]));
  } else if constexpr (kInputs == 16) {
    SEEMORE_MMA("m16n8k16", "bf16", "{%8, %9, %10, %11}, {%12, %13}", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, __half>) {
    SEEMORE_MMA("m16n8k8", "f16", "{%8, %9}, {%10}", "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else {
    SEEMORE_MMA("m16n8k8", "bf16", "{%8, %9}, {%10}", "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
#undef SEEMORE_MMA
#else
  __trap();  // engine.py leaves such GPUs to the operators
#endif
}

// Quads of words that hold a matrix of so many outputs (in eights) and inputs (in words of a lane).
constexpr __host__ __device__ int quads_of(int outputs, int inputs) { return (outputs * inputs + 3) / 4; }

// sums[pixel][output] = start + weights x, for kPixels / 2 times 16 pixels. start(pixel, output): two floats, which may
// be the sums'. weights: [quad][lane of the warp], as `pack` wrote them, which all warps of a multiprocessor find in
// its first-level cache.
template <class T, int kOutputs, int kPixels, int kInputs, class Start>
__device__ void multiply(float (&sums)[kPixels][kOutputs][2], const uint32_t (&x)[kPixels][kInputs],
                         const uint4* weights, Start start) {
  const uint4* const own = weights + threadIdx.x % kWarp;
  uint4 quad;
  int next = 0;
  const auto read = [&] {
    const int word = next++;
    if (word > 0 && word % 16 == 0) __syncwarp();  // or all are read in advance, for which there are no registers
    if (word % 4 == 0) quad = own[word / 4 * kWarp];
    return word % 4 == 0 ? quad.x : word % 4 == 1 ? quad.y : word % 4 == 2 ? quad.z : quad.w;
  };
#pragma unroll
  for (int i = 0; i < kInputs; i += 2) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const bool is_pair = i + 1 < kInputs;
      const uint32_t b[2] = {read(), is_pair ? read() : 0};
#pragma unroll
      for (int p = 0; p < kPixels; p += 2) {
        using Pair = const float (&)[2];
        Pair first = i == 0 ? start(p, o) : static_cast<Pair>(sums[p][o]);
        Pair second = i == 0 ? start(p + 1, o) : static_cast<Pair>(sums[p + 1][o]);
        if (is_pair) {
          const int j = i + 1 < kInputs ? i + 1 : i;
          multiply_add<T, 16>(sums[p][o], sums[p + 1][o], {x[p][i], x[p + 1][i], x[p][j], x[p + 1][j]}, b, first,
                              second);
        } else {
          multiply_add<T, 8>(sums[p][o], sums[p + 1][o], {x[p][i], x[p + 1][i]}, {b[0]}, first, second);
        }
      }
    }
  }
}

// sums += weights x
template <class T, int kOutputs, int kPixels, int kInputs>
__device__ void multiply(float (&sums)[kPixels][kOutputs][2], const uint32_t (&x)[kPixels][kInputs],
                         const uint4* weights) {
  multiply<T>(sums, x, weights, [&](int p, int o) -> const float (&)[2] { return sums[p][o]; });
}

// sums = bias + weights x
template <class T, int kOutputs, int kPixels, int kInputs>
__device__ void multiply(float (&sums)[kPixels][kOutputs][2], const uint32_t (&x)[kPixels][kInputs],
                         const uint4* weights, const float (&bias)[kOutputs][2]) {
  multiply<T>(sums, x, weights, [&](int, int o) -> const float (&)[2] { return bias[o]; });
}

// The sum of a quad's lanes, in each of them.
__device__ inline float sum_of_quad(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// Sums as operands of type T.
template <class T, int kCount>
__device__ void narrow(uint32_t (&to)[kCount], const float (&sums)[kCount][2]) {
#pragma unroll
  for (int word = 0; word < kCount; ++word) to[word] = pack_pair<T>(sums[word][0], sums[word][1]);
}

// Numbers of all channels, the lane's part of them. values: in the order of channels, aligned to 16 bytes.
template <int kChannels, int kFirst = 0, int kCount = kWords<kChannels>>
__device__ void read_channels(float (&to)[kCount][2], const float* values, const Lane& lane) {
#pragma unroll
  for (int word = 0; word < kCount; word += 2) {
    const float* const from = values + channel_of(kChannels, kFirst + word, lane.quarter);
    if (word + 1 < kCount) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      to[word][0] = four.x, to[word][1] = four.y, to[word + 1][0] = four.z, to[word + 1][1] = four.w;
    } else {
      const float2 pair = *reinterpret_cast<const float2*>(from);
      to[word][0] = pair.x, to[word][1] = pair.y;
    }
  }
}

// Features of pixels in 16 bit, in global or shared memory: [pixel][32 channels], and [pixel][the others].
struct FeatureMemory {
  uint32_t *head, *tail;
};

template <int kChannels>
struct Features : FeatureMemory {
  static constexpr int kTail = (kChannels - kHead) / 8;  // words of a lane

  __host__ __device__ static int64_t words(int64_t pixels) { return pixels * (kChannels / 2); }
  __host__ __device__ static Features at(void* memory, int64_t pixels) {
    uint32_t* const words = static_cast<uint32_t*>(memory);
    return {{words, words + pixels * (kHead / 2)}};
  }

  template <class Index>
  __device__ void read_head(uint32_t (&to)[kHead / 8], Index pixel, const Lane& lane) const {
    const uint4 quad = *reinterpret_cast<const uint4*>(head + pixel * (kHead / 2) + 4 * lane.quarter);
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
  }
  template <class Index>
  __device__ void read_tail(uint32_t (&to)[kTail], Index pixel, const Lane& lane) const {
    const uint32_t* const from = tail + pixel * (4 * kTail) + kTail * lane.quarter;
    if constexpr (kTail == 1) {
      to[0] = *from;
    } else if constexpr (kTail == 2) {
      const uint2 pair = *reinterpret_cast<const uint2*>(from);
      to[0] = pair.x, to[1] = pair.y;
    } else {
      const uint4 quad = *reinterpret_cast<const uint4*>(from);
      to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
    }
  }
  template <class Index>
  __device__ void read(uint32_t (&to)[kWords<kChannels>], Index pixel, const Lane& lane) const {
    uint32_t first[kHead / 8], others[kTail];
    read_head(first, pixel, lane);
    read_tail(others, pixel, lane);
#pragma unroll
    for (int word = 0; word < kWords<kChannels>; ++word)
      to[word] = word < 4 ? first[word % 4] : others[(word - 4) % kTail];
  }
  template <class Index>
  __device__ void write(Index pixel, const uint32_t (&from)[kWords<kChannels>], const Lane& lane) const {
    *reinterpret_cast<uint4*>(head + pixel * (kHead / 2) + 4 * lane.quarter) =
        make_uint4(from[0], from[1], from[2], from[3]);
    uint32_t* const to = tail + pixel * (4 * kTail) + kTail * lane.quarter;
    if constexpr (kTail == 1) {
      *to = from[4];
    } else if constexpr (kTail == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(from[4], from[5]);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(from[4], from[5], from[6], from[7]);
    }
  }
};

// What LayerNorm makes of a number x: x scale + shift.
struct Norm {
  float scale, shift;
};

// x - mean over the channels, divided by the square root of the variance. Those beyond `channels` are 0 in x; what
// becomes of them belongs to weights that are 0.
template <int kCount>
__device__ Norm normalise(float (&x)[kCount][2], int channels) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int word = 0; word < kCount; ++word) sum += x[word][0] + x[word][1];
  const float share = reciprocal(static_cast<float>(channels)), mean = sum_of_quad(sum) * share;
#pragma unroll
  for (int word = 0; word < kCount; ++word) {
#pragma unroll
    for (int i = 0; i < 2; ++i) x[word][i] -= mean, squares += x[word][i] * x[word][i];
  }
  const float others = static_cast<float>(8 * kCount - channels) * (mean * mean);
  const float scale = reciprocal_root(fmaxf(sum_of_quad(squares) - others, 0) * share + 1e-6f);
#pragma unroll
  for (int word = 0; word < kCount; ++word) x[word][0] *= scale, x[word][1] *= scale;
  return {scale, -mean * scale};
}

// The same of a pixel of type T, as operands.
template <class T, int kCount>
__device__ Norm normalise(uint32_t (&x)[kCount], int channels) {
  float wide[kCount][2];
#pragma unroll
  for (int word = 0; word < kCount; ++word) unpack_pair<T>(wide[word], x[word]);
  const Norm norm = normalise(wide, channels);
  narrow<Operand>(x, wide);
  return norm;
}

// The same, where it was computed before.
template <class T, int kCount>
__device__ void normalise(uint32_t (&x)[kCount], const Norm& norm) {
#pragma unroll
  for (int word = 0; word < kCount; ++word) {
    float wide[2];
    unpack_pair<T>(wide, x[word]);
    x[word] = pack_pair<Operand>(wide[0] * norm.scale + norm.shift, wide[1] * norm.scale + norm.shift);
  }
}

// The word of two equal numbers, which are positive and normal.
__host__ __device__ constexpr uint32_t pair_of(double number) {
  int exponent = 15;
  for (; number >= 2; number /= 2) ++exponent;
  for (; number < 1; number *= 2) --exponent;
  return static_cast<uint32_t>(exponent * 1024 + static_cast<int>((number - 1) * 1024 + 0.5)) * 0x10001u;
}

// GELU of the doubles of both numbers of a word: weights before a GELU are packed as half of what they are, which is
// exact and saves a multiplication. For networks of bfloat16 by s (1 + tanh(s (a + b s^2))) / 2 in float16, within
// 1.6e-3; for those of float16 as `short_gelu`.
template <class T>
__device__ uint32_t gelu_of_doubles(const float (&h)[2]);

template <class T>
__device__ uint32_t gelu_of_doubles(uint32_t h) {
  if constexpr (std::is_same_v<T, __half>) {
    float wide[2];
    unpack_pair<Operand>(wide, h);
    return gelu_of_doubles<T>(wide);
  } else {
    constexpr uint32_t kLinear = pair_of(2 * 0.8001572), kCubic = pair_of(8 * 0.0347012);
    const uint32_t slope = multiply_add_pairs(kCubic, multiply_pairs(h, h), kLinear);
    return multiply_add_pairs(h, hyperbolic_tangents(multiply_pairs(h, slope)), h);
  }
}

template <class T>
__device__ uint32_t gelu_of_doubles(const float (&h)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    float result[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float square = fminf(h[i] * h[i], 16);
      const float p = (square * (32 * 0.000995201504f) - 8 * 0.10662615f) * square - 2 * 2.30134832f;
      result[i] = h[i] * reciprocal(power_of_two(h[i] * p - 1) + 0.5f);
    }
    return pack_pair<Operand>(result[0], result[1]);
  } else {
    return gelu_of_doubles<T>(pack_pair<Operand>(h[0], h[1]));
  }
}

template <int kPixels, int kCount>
__device__ void fill(float (&sums)[kPixels][kCount][2], const float (&values)[kCount][2]) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
#pragma unroll
    for (int word = 0; word < kCount; ++word) sums[p][word][0] = values[word][0], sums[p][word][1] = values[word][1];
  }
}

// Call function(T(), an integral_constant: the padded channels).
template <class Function>
void with_features(DType dtype, int64_t channels, Function function) {
  const auto with_channels = [&](auto type) {
    if (channels <= 40) return function(type, std::integral_constant<int, 40>());
    if (channels <= 48) return function(type, std::integral_constant<int, 48>());
    return function(type, std::integral_constant<int, 64>());
  };
  return dtype == DType::float16 ? with_channels(__half()) : with_channels(__nv_bfloat16());
}

}  // namespace seemore::gpu
