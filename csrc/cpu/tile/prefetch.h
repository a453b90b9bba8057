// Software prefetch of pixels, spread over the products of the block before.
#pragma once

#include "cpu/tile/matrix.h"
#include "cpu/tile/rows.h"
#include "params/layer_types.h"

namespace seemore::SEEMORE_ISA {

// Prefetches the next pixels, a few at a time, beside other work: the processor does not foresee the jump from channel
// to channel.
class Prefetcher {
 public:
  Prefetcher() = default;
  // Of `count` adjacent pixels from `place` on, while a product computes `rows` rows of `width` pixels, with a call of
  // `advance` for each of its register tiles.
  Prefetcher(const TypedImage& image, const Place& place, int64_t count, int64_t rows, int64_t width) {
    const int64_t calls = (rows + 5) / 6 * ((width + kTileVectors * kWidth - 1) / (kTileVectors * kWidth));
    const int64_t bytes = image.dtype == DType::float64 ? 8 : image.dtype == DType::float32 ? 4 : 2;
    const int64_t offset = place.b * image.view.batch + place.c * image.view.channel + place.h * image.view.row +
                           place.w * image.view.column;
    if (image.view.column != 1 || calls == 0) return;
    from_ = static_cast<const char*>(image.view.data) + offset * bytes;
    channel_stride_ = image.view.channel * bytes, length_ = count * bytes, channels_ = place.channels;
    at_once_ = (channels_ * ((length_ + kCacheLine - 1) / kCacheLine) + calls - 1) / calls;
  }

  void advance() {
    for (int64_t i = 0; i < at_once_ && channels_ > 0; ++i) {
      __builtin_prefetch(from_ + offset_, 0, 2);
      offset_ += kCacheLine;
      if (offset_ >= length_) offset_ = 0, from_ += channel_stride_, --channels_;
    }
  }

 private:
  static constexpr int64_t kCacheLine = 64;  // bytes

  const char* from_ = nullptr;
  int64_t channel_stride_ = 0, length_ = 0, channels_ = 0, at_once_ = 0, offset_ = 0;
};

}  // namespace seemore::SEEMORE_ISA
