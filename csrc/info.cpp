// seemore_fast._C: the features of this processor. The libraries work without it.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::list cpu_features() {
  py::list found;
#if defined(__x86_64__)
#define FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.append(name)
  FEATURE("avx");
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("avx512f");
  FEATURE("avx512bw");
  FEATURE("avx512dq");
  FEATURE("avx512vl");
  FEATURE("avx512bf16");
#undef FEATURE
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this processor has.";
  m.def("cpu_features", &cpu_features, "Return the vector extensions of this processor.");
}
