#include "cpu/tile/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>

namespace seemore {

void parallel_for(int64_t count, void (*body)(const void*, int64_t, int64_t), const void* context) {
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(context, begin, end);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace seemore
