// Vector accesses: neighbours in memory, read and written at once.
//
// They travel as words of 32 bits, which are taken apart where the numbers are used: 16-bit elements that live across a
// branch or a loop's end would be taken apart where they arrive, which waits for the load.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda/common/types.h"

// V numbers, aligned for one access, or for several of 16 bytes.
template <typename T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T value[V];
};

// The same as 32-bit words.
template <typename T, int V>
struct alignas(Pack<T, V>) Words {
  using Word = std::conditional_t<sizeof(Pack<T, V>) == 2, uint16_t, uint32_t>;
  static constexpr int kCount = sizeof(Pack<T, V>) / sizeof(Word);
  Word value[kCount];

  Words() = default;
  __device__ explicit Words(const Pack<T, V>& pack) { memcpy(value, &pack, sizeof(value)); }
  __device__ explicit operator Pack<T, V>() const {
    Pack<T, V> pack;
    memcpy(&pack, value, sizeof(pack));
    return pack;
  }
};

template <int V, typename T>
__device__ Words<T, V> load_words(const T* from) {
  return *reinterpret_cast<const Words<T, V>*>(from);
}

// By name: of a struct's elements, nvcc stores some one by one.
template <typename T, int V>
__device__ void store_words(T* to, const Words<T, V>& words) {
#ifdef __CUDA_ARCH__
  constexpr int kCount = Words<T, V>::kCount;
  static_assert(V > 1);
  const size_t at = __cvta_generic_to_global(to);
  if constexpr (kCount == 1) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(words.value[0]) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(words.value[0]), "r"(words.value[1]) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at + i * sizeof(uint32_t)), "r"(words.value[i]),
                   "r"(words.value[i + 1]), "r"(words.value[i + 2]), "r"(words.value[i + 3])
                   : "memory");
    }
  }
#else
  memcpy(to, &words, sizeof(words));
#endif
}

// The first `count` of V neighbours; the others are 0. Vectors of kVector are read at once, all or none of them.
template <int kVector, int V, typename T>
__device__ Words<T, V> load(const T* from, int count) {
  if constexpr (kVector > 1) {
    Words<T, V> words = {};
#pragma unroll
    for (int v = 0; v < V; v += kVector) {
      if (v >= count) continue;
      const auto vector = load_words<kVector>(from + v);
      memcpy(words.value + v * sizeof(T) / sizeof(*words.value), vector.value, sizeof(vector));
    }
    return words;
  } else {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = v < count ? from[v] : to_storage<T>(0);
    return Words<T, V>(pack);
  }
}

template <int kVector, typename T, int V>
__device__ void store(T* to, int count, const Words<T, V>& words) {
  if constexpr (kVector > 1) {
#pragma unroll
    for (int v = 0; v < V; v += kVector) {
      Words<T, kVector> vector;
      memcpy(vector.value, words.value + v * sizeof(T) / sizeof(*words.value), sizeof(vector));
      if (v < count) store_words(to + v, vector);
    }
  } else {
    const Pack<T, V> pack(words);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v < count) to[v] = pack.value[v];
    }
  }
}

template <typename T, int V>
__device__ Pack<Accumulation<T>, V> to_accum(const Words<T, V>& words) {
  Pack<Accumulation<T>, V> wide;
  if constexpr (std::is_same_v<T, __nv_bfloat16> && V % 2 == 0) {  // which is the upper half of a float
    uint32_t bits[V];
#pragma unroll
    for (int v = 0; v < V; ++v) bits[v] = v % 2 ? words.value[v / 2] & 0xffff0000 : words.value[v / 2] << 16;
    memcpy(&wide, bits, sizeof(wide));
  } else {
    const Pack<T, V> pack(words);
#pragma unroll
    for (int v = 0; v < V; ++v) wide.value[v] = to_accum(pack.value[v]);
  }
  return wide;
}

template <typename T, int V>
__device__ Words<T, V> to_storage(const Pack<Accumulation<T>, V>& wide) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.value[v] = to_storage<T>(wide.value[v]);
  return Words<T, V>(pack);
}

// How many neighbours, from each multiple of their number on, can be read and written at once in all of the images: at
// most `most`, half as many, .. 1. The pixels of a row must be neighbours.
inline int vector_of(std::initializer_list<seemore::Image> images, int64_t width, size_t bytes, int most = 4) {
  for (const seemore::Image& image : images) {
    if (image.data == nullptr || image.column == 1 || width <= 1) continue;
    throw std::runtime_error("an image with a stride of " + std::to_string(image.column) +
                             " between the pixels of a row, expected 1");
  }
  const auto are_aligned = [&](int count) {
    return std::all_of(images.begin(), images.end(), [&](const seemore::Image& image) {
      return image.data == nullptr ||
             ((image.batch | image.channel | image.row | width) % count == 0 &&
              reinterpret_cast<uintptr_t>(image.data) % std::min<size_t>(count * bytes, 16) == 0);
    });
  };
  while (most > 1 && !are_aligned(most)) most /= 2;
  return most;
}

// Call function(an integral_constant: vector_of).
template <int kMost = 4, typename Function>
void with_vector(int vector, Function function) {
  if constexpr (kMost > 1) {
    if (vector < kMost) return with_vector<kMost / 2>(vector, function);
  }
  function(std::integral_constant<int, kMost>());
}
