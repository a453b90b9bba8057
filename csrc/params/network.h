// The whole network for inference, as the CPU library sees it; its definition is seemore_fast/reference/model.py.
#pragma once

#include "params/views.h"

namespace seemore {

// The fields of a configuration in their order, which is that of EngineConfig in seemore_fast/network/engine.py.
// is_bfloat16: operands of the dense and pointwise convolutions; all else is float32.
#define SEEMORE_NETWORK_FIELDS(FIELD) \
  FIELD(scale)                        \
  FIELD(in_channels)                  \
  FIELD(channels)                     \
  FIELD(groups)                       \
  FIELD(taps)                         \
  FIELD(recursive)                    \
  FIELD(top_k)                        \
  FIELD(is_shuffled)                  \
  FIELD(is_bfloat16)

struct NetworkConfig {
#define FIELD(name) int64_t name;
  SEEMORE_NETWORK_FIELDS(FIELD)
#undef FIELD
  int64_t experts;
  const int64_t* ranks;  // of the experts
};

// Elements of `parameters`, the model's in the order of its state dict, and bytes of the packed weights.
struct NetworkSizes {
  int64_t parameters, weights;
};

NetworkSizes network_sizes(const NetworkConfig& config);

// Fold what folds exactly and put the weights into the order in which they are used.
void network_pack(const NetworkConfig& config, const float* parameters, void* weights);

struct Network {
  NetworkConfig config;
  Size size;          // of x; height and width are at least 4^recursive
  int64_t whole;      // of x and y: 0 for float32, 255 for uint8, 65535 for uint16, which stands for 1
  Image x, y;         // y: (B, in_channels, scale * H, scale * W)
  const float* mean;  // in_channels
  float img_range;
  const void* weights;  // from network_pack
  int64_t threads;      // into how many bands to cut the images; results do not depend on it
  int64_t lines;        // 0, or the state is mapped, fresh and zero: at most so many lines of its file at a time
  int64_t kept;         // the state's first bytes, which no file has
  int64_t* progress;    // null, or two numbers that others may read meanwhile: how much is done, of how much
};

// Bytes of what is kept of the features of all pixels, and of all else that a run needs.
struct NetworkMemory {
  int64_t state, rest;
};

NetworkMemory network_memory(const Network& network);
// Returns whether all pixels are numbers, where y holds integers.
bool network(const Network& network, void* state, void* rest);

}  // namespace seemore
