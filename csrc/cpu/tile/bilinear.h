// Positions of bilinear interpolation, for the operator and the network.
#pragma once

#include "cpu/simd/vec.h"

namespace seemore::SEEMORE_ISA {

// The position of pixel i of `pixels` on an axis of `small` elements, as in torch's upsample_bilinear2d,
// align_corners=False; in float64, since an error of a share is that of a whole column.
struct BilinearPosition {
  BilinearPosition(int64_t i, int64_t pixels, int64_t small) {
    const double scale = static_cast<double>(small) / static_cast<double>(pixels);
    const double inside = (static_cast<double>(i) + 0.5) * scale - 0.5, position = inside > 0 ? inside : 0;
    before = smaller(static_cast<int64_t>(position), small - 1);
    after = smaller(before + 1, small - 1);
    share = position - static_cast<double>(before);
  }

  int64_t before, after;
  double share;  // of `after`
};

}  // namespace seemore::SEEMORE_ISA
