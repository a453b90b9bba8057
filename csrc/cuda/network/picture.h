// The picture, with which the network begins and ends, and the first convolution. The picture itself travels through
// these: they are as accurate as float32, of which a pair of bfloat16 keeps 16 bits.
#pragma once

#include "cuda/network/rings.h"

namespace seemore::gpu {

using Upper = __nv_bfloat16;  // of a float; what it leaves is the lower one

// The images, and what turns their numbers into those of the network.
struct Picture {
  Image x, y;
  float max_value;  // 255 of uint8, 65535 of uint16, 1 of float32
  float img_range, inverse_range;
  const float* mean;  // of each channel
  int* is_finite;     // null, or 1 until a result is not
  int channels, scale;

  // The number at an offset of x, from 0 to 1.
  template <class Number>
  __device__ float read(int64_t offset) const {
    const float number = static_cast<const Number*>(x.data)[offset];
    return std::is_same_v<Number, float> ? number : number / max_value;
  }

  // Integers are rounded to the nearest, ties to even.
  template <class Number>
  __device__ Number number_of(float value) const {
    if constexpr (std::is_same_v<Number, float>) {
      return value;
    } else {
      if (is_finite && !(fabsf(value) < INFINITY)) *is_finite = 0;
      return static_cast<Number>(rintf(fminf(fmaxf(value, 0), 1) * max_value));
    }
  }
};

// A step's rows of kPictureChannels channels in shared memory, and those beside them, as words of two neighbouring
// columns: the upper parts of numbers, and the lower ones.
struct PictureTile {
  static constexpr int kRows = kStep + 2, kMore = 4;
  uint32_t* words;  // [part][channel][row][column]
  int row_stride;

  __host__ __device__ static int64_t bytes(int columns) {
    return int64_t(2) * kPictureChannels * kRows * (columns + kMore) * sizeof(uint32_t);
  }
  __device__ PictureTile(void* memory, int columns)
      : words(static_cast<uint32_t*>(memory)), row_stride(columns + kMore) {}

  // How many of the chunk's channels there are.
  static __device__ int channels_of(const Picture& picture, int chunk) {
    return min(kPictureChannels, picture.channels - chunk * kPictureChannels);
  }

  // Reads the rows around the step whose first is `row`, a warp each.
  template <class Number>
  __device__ void fill(const Picture& picture, const Walk& walk, const Part& part, int row, int chunk) const {
    const int lane = threadIdx.x % kWarp;
    for (int line = threadIdx.x / kWarp; line < kRows * channels_of(picture, chunk); line += blockDim.x / kWarp) {
      const int channel = chunk * kPictureChannels + line / kRows, y = row - 1 + line % kRows;
      const int64_t offset = part.image * picture.x.batch + channel * picture.x.channel + y * picture.x.row;
      const float mean = picture.mean[channel];
      for (int begin = 0; begin < row_stride; begin += kWarp - 1) {
        const int column = begin + lane, x = part.first - 1 + column;
        float pair[2] = {0, 0}, upper[2];
        if (y >= 0 && y < walk.height && x >= 0 && x < walk.width) {
          pair[0] = (picture.read<Number>(offset + x * picture.x.column) - mean) * picture.img_range;
        }
        pair[1] = __shfl_down_sync(kAllLanes, pair[0], 1);
        if (lane == kWarp - 1 || column >= row_stride) continue;
        uint32_t* const to = words + line * row_stride + column;
        *to = pack_pair<Upper>(pair[0], pair[1]);
        unpack_pair<Upper>(upper, *to);
        to[kPictureChannels * kRows * row_stride] = pack_pair<Upper>(pair[0] - upper[0], pair[1] - upper[1]);
      }
    }
  }

  // Row `down` of the windows of the unit's pixels, as `pack` has their weights: a lane of a quad has a channel, of
  // which its words are the first two columns, and the others. Lanes without a channel have weights of 0.
  __device__ void read(uint32_t (&to)[kPixels][2], bool is_lower, int channels, int down, const Unit& unit) const {
    const int channel = min(unit.lane.quarter, channels - 1) + (is_lower ? kPictureChannels : 0);
    const uint32_t* const from = words + (channel * kRows + unit.row + down) * row_stride + unit.column;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        to[p][word] = from[Unit::row_of(p) * row_stride + 8 * (p % 2) + 2 * word];
      }
    }
  }
};

// sums += the first convolution, of a step's rows from `row` on. All threads of the block call it; those before it may
// still read what they computed of the tile.
template <class Number, int kCount>
__device__ void add_first_conv(float (&sums)[kPixels][kCount][2], const PictureTile& tile, const Picture& picture,
                               const EndWeights& weights, const Walk& walk, const Part& part, const Unit& unit,
                               int row) {
  for (int chunk = 0; chunk * kPictureChannels < picture.channels; ++chunk) {
    if (chunk > 0) __syncthreads();
    tile.template fill<Number>(picture, walk, part, row, chunk);
    __syncthreads();
    const int channels = PictureTile::channels_of(picture, chunk);
#pragma unroll 1
    for (int down = 0; down < 3; ++down) {
      const int at = (3 * chunk + down) * quads_of(kCount, 2) * kWarp;
      uint32_t lower[kPixels][2], upper[kPixels][2];
      tile.read(lower, true, channels, down, unit);
      multiply<Upper>(sums, lower, weights.first[0] + at);
      tile.read(upper, false, channels, down, unit);
      multiply<Upper>(sums, upper, weights.first[1] + at);
      multiply<Upper>(sums, upper, weights.first[0] + at);
    }
  }
}

}  // namespace seemore::gpu
