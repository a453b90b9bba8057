// striped_conv_router on the CPU: striped_conv's forward, which adds up its results. So the router's pool, which
// would read all of it again, costs next to nothing; the decision is in router_decision.cpp.

#include "params/striped_conv_router.h"

#include "cpu/ops/striped_conv_forward.h"

namespace seemore::SEEMORE_ISA {

int64_t striped_conv_router_parts(const StripedConv& in) { return tiling_of(in.size, in.x).parts_of_image(); }

void striped_conv_router(const StripedConv& in, const Image& y, float* sums, void*) {
  const Tiling tiling = tiling_of(in.size, in.x);
  with_type_and_taps(in, [&](auto* type, auto taps) {
    using T = typename Pointee<decltype(type)>::type;
    if constexpr (sizeof(T) != sizeof(double)) {  // which the operator refuses
      using Forward = StripedConvForward<T, taps.value, true>;
      const auto make = [&] { return Forward(in, y, tiling); };
      for_each_tile(tiling, make, [&](const Tile& tile, Forward& forward) {
        float* const to = sums + (tiling.part_of_image(tile) * in.size.batch + tile.b) * in.size.channels + tile.c;
        forward(tile, to);
      });
    }
  });
}

}  // namespace seemore::SEEMORE_ISA
