// The whole network for inference; its definition is seemore_fast/reference/model.py.
#pragma once

#include "params/views.h"

namespace seemore {

// The fields of a configuration in their order, which is that of EngineConfig in seemore_fast/network/engine.py.
// dtype: a DType, of the operands of the dense and pointwise convolutions, and on a GPU of features between launches;
// all else is float32.
#define SEEMORE_NETWORK_FIELDS(FIELD) \
  FIELD(scale)                        \
  FIELD(in_channels)                  \
  FIELD(channels)                     \
  FIELD(groups)                       \
  FIELD(taps)                         \
  FIELD(recursive)                    \
  FIELD(top_k)                        \
  FIELD(is_shuffled)                  \
  FIELD(dtype)

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

// Fold the weights as far as that is exact, and put them into the order of their use. `stream`, here and below: a
// cudaStream_t, of the CUDA library.
void network_pack(const NetworkConfig& config, const float* parameters, void* weights, void* stream);

struct Network {
  NetworkConfig config;
  Size size;          // of x; height and width are at least 4^recursive
  int64_t max_value;  // of x and y: 0 for float32, 255 for uint8, 65535 for uint16, which stands for 1
  Image x, y;         // y: (B, in_channels, scale * H, scale * W)
  const float* mean;  // in_channels
  float img_range;
  const void* weights;  // from network_pack
  void* stream;
  int* is_finite;  // of the CUDA library: null, or set to 0 where a pixel was not before it became an integer
  // Of the CPU library.
  int64_t threads;        // the least number of bands of the images; results do not depend on it
  int64_t resident_rows;  // 0, or the state is a mapped file, new and zero, of which at most so many rows are in memory
  int64_t resident_bytes;  // at the beginning of the state, which the file does not have
  int64_t* progress;       // null, or two numbers that other threads may read meanwhile: how much is done, of how much
};

// Bytes of the features of all pixels that are kept between sweeps, and of all other memory of a run.
struct NetworkMemory {
  int64_t state, workspace;
};

NetworkMemory network_memory(const Network& network);
// Returns whether all pixels were finite before they were converted to integers; of the CUDA library, is_finite does.
bool network(const Network& network, void* state, void* workspace);

struct Rows {
  int64_t first, last;  // [first, last)
};

// A part of the CUDA library's run for one image whose features are in the host's memory: rows between two pools.
struct NetworkPart {
  int64_t pass;    // 0: from the image to the first pool; n: from the n-th pool to the next one, or to the result
  Rows rows;       // a band's; all but the last are `unit` rows each, or a multiple
  Rows before;     // those of the part before, whose features are in its band yet; or none
  void* features;  // of all pixels, in the host's memory
};

// Bytes of a band of so many rows, of all else on the GPU, and of `features`; and `unit`, upon which bands begin.
struct NetworkPartMemory {
  int64_t band, rest, features, unit;
};

NetworkPartMemory network_part_memory(const Network& network, int64_t rows);
// Parts follow each other by passes, then rows. The first pass and the last read x, up to three rows around `rows`; the
// last one writes y.
void network_part(const Network& network, const NetworkPart& part, int64_t band_rows, void* band, void* rest);

}  // namespace seemore
