// striped_conv_router on CUDA: striped_conv's walk, which adds up what it writes. So the router's pool, which would
// read all of it again, costs nothing; router.cu does the rest.

#include "striped_conv_router.h"
#include "striped_conv_walk.h"

namespace seemore {

int64_t striped_conv_router_parts(const StripedConv& conv) {
  if (!can_walk(conv)) throw std::runtime_error("striped_conv_router: expected 3, 7 or 11 taps and not float64");
  return walk_striped_conv_sums(conv);
}

void striped_conv_router(const StripedConv& conv, const Image& y, float* sums, void* stream) {
  walk_striped_conv(conv, y, sums, stream);
}

}  // namespace seemore
