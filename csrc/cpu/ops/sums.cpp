// The sum of partial sums; not performance-critical: compiled once.

#include "params/sums.h"

#include <torch/headeronly/util/BFloat16.h>

#include <stdexcept>

namespace seemore {
namespace {

template <class T, class A>
void add(const Sums& sums) {
  int64_t columns = 0, first = 0;
  for (const auto& target : sums.targets) columns += target.columns;
  for (const auto& [data, count] : sums.targets) {
    for (int64_t channel = 0; channel < sums.channels; ++channel) {
      for (int64_t i = 0; i < count; ++i) {
        double sum = 0;
        for (int64_t part = 0; part < sums.parts; ++part) {
          sum += static_cast<const A*>(sums.partial)[(part * sums.channels + channel) * columns + first + i];
        }
        static_cast<T*>(data)[channel * count + i] = static_cast<T>(static_cast<A>(sum));
      }
    }
    first += count;
  }
}

}  // namespace

void add_parts(const Sums& sums, void*) {
  switch (sums.dtype) {
    case DType::float32:
      return add<float, float>(sums);
    case DType::float64:
      return add<double, double>(sums);
    case DType::bfloat16:
      return add<c10::BFloat16, float>(sums);
    case DType::float16:
      throw std::runtime_error("add_parts: float16, expected a type that the CPU's kernels have");
  }
}

}  // namespace seemore
