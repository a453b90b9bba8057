// Software prefetch of pixels, spread over the products of the block before.
#pragma once

#include "cpu/tile/matrix.h"
#include "cpu/tile/rows.h"
#include "params/layer_types.h"

namespace seemore::SEEMORE_ISA {

// Asks for the memory of the pixels that come next, a little at a time, while there is work to do: the processor does
// not foresee that one channel follows on another.
class Ahead {
 public:
  Ahead() = default;
  // Of `count` pixels from `place` on that lie one after another, while a product makes `rows` rows of `width` pixels:
  // a call of `some` for each of its tiles.
  Ahead(const TypedImage& image, const Place& place, int64_t count, int64_t rows, int64_t width) {
    const int64_t calls = (rows + 5) / 6 * ((width + kTileVectors * kWidth - 1) / (kTileVectors * kWidth));
    const int64_t bytes = image.dtype == DType::float64 ? 8 : image.dtype == DType::float32 ? 4 : 2;
    const int64_t offset = place.b * image.view.batch + place.c * image.view.channel + place.h * image.view.row +
                           place.w * image.view.column;
    if (image.view.column != 1 || calls == 0) return;
    from_ = static_cast<const char*>(image.view.data) + offset * bytes;
    apart_ = image.view.channel * bytes, length_ = count * bytes, channels_ = place.channels;
    at_once_ = (channels_ * ((length_ + kLine - 1) / kLine) + calls - 1) / calls;
  }

  void some() {
    for (int64_t i = 0; i < at_once_ && channels_ > 0; ++i) {
      __builtin_prefetch(from_ + at_, 0, 2);
      at_ += kLine;
      if (at_ >= length_) at_ = 0, from_ += apart_, --channels_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes

  const char* from_ = nullptr;
  int64_t apart_ = 0, length_ = 0, channels_ = 0, at_once_ = 0, at_ = 0;
};

}  // namespace seemore::SEEMORE_ISA
