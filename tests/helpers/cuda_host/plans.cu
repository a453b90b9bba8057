// How kernels share images out, as tests ask.

#include "cuda/common/sweep.h"
#include "cuda/ops/calibrate_kernels.h"

// Writes lanes, across, down, rows, lead, strips.
extern "C" __attribute__((visibility("default"))) void plan(const int64_t* size, int warps, int halo, int overlap,
                                                            int multiprocessors, int64_t* sweep) {
  const Sweep found = sweep_over({size[0], size[1], size[2], size[3]}, warps, halo, overlap, multiprocessors);
  const int64_t numbers[] = {found.lanes, found.across, found.down, found.rows, found.lead, found.strips};
  std::copy(std::begin(numbers), std::end(numbers), sweep);
}

// Of an image of such strides whose data are at `address`, in elements of so many bytes; 0 where it is refused.
extern "C" __attribute__((visibility("default"))) int vector(const int64_t* strides, int64_t width, int64_t address,
                                                             int bytes, int most) {
  const seemore::Image image{reinterpret_cast<void*>(address), strides[0], strides[1], strides[2], strides[3]};
  try {
    return vector_of({image}, width, bytes, most);
  } catch (const std::runtime_error&) {
    return 0;
  }
}

// Partial sums of calibrate's weight_agg: as many as blocks have a plane of one channel.
extern "C" __attribute__((visibility("default"))) int64_t spread_parts(const int64_t* size, int64_t recursive) {
  seemore::Calibrate inputs{};
  inputs.size = {size[0], size[1], size[2], size[3]};
  inputs.recursive = recursive;
  return calibrating::spread_parts(inputs);
}
