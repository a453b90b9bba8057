// striped_conv_router on CUDA: striped_conv's sweep, which adds up its results. So the router's pool, which would
// read all of it again, costs nothing; router.cu does the rest.

#include "cuda/ops/striped_conv_sweep.h"
#include "params/striped_conv_router.h"

namespace seemore {

int64_t striped_conv_router_parts(const StripedConv& conv) { return striped_conv_sum_parts(conv); }

void striped_conv_router(const StripedConv& conv, const Image& y, float* sums, void* stream) {
  striped_conv_with_sums(conv, y, sums, stream);
}

}  // namespace seemore
