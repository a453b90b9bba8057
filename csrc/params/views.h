// Views of tensors: plain structs, free of torch, the same for both libraries.
#pragma once

#include <cstdint>

namespace seemore {

enum class DType : int32_t { float32, float64, float16, bfloat16 };
enum class Activation : int32_t { none, gelu };

struct Size {
  int64_t batch, channels, height, width;
};

// A (B, C, H, W) tensor with any strides, counted in elements. `data` is null for an optional tensor that is absent.
struct Image {
  void* data;
  int64_t batch, channel, row, column;  // strides
};

}  // namespace seemore
