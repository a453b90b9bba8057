// seemore_fast._C: what was built, and for what. The libraries work without it.

#include <pybind11/pybind11.h>

#include <regex>
#include <sstream>
#include <string>

namespace py = pybind11;

extern const char* const ptxas_report;

namespace {

py::list words(const std::string& text) {
  py::list result;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) result.append(word);
  return result;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = SEEMORE_COMPILER;
  info["torch"] = SEEMORE_TORCH;
  info["instruction_sets"] = words(SEEMORE_INSTRUCTION_SETS);
  info["nvcc"] = std::string(SEEMORE_NVCC).empty() ? py::object(py::none()) : py::str(SEEMORE_NVCC);
  info["cuda_architectures"] = words(SEEMORE_ARCHITECTURES);
  return info;
}

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

// What ptxas said of every kernel: {(kernel, architecture): {"registers": ..., "stack": ..., "spills", "shared"}}.
py::dict kernel_resources() {
  py::dict kernels;
  std::istringstream report(ptxas_report);
  const std::regex compiling("Compiling entry function '(\\S+)' for '(\\S+)'");
  const std::regex stack("(\\d+) bytes stack frame, (\\d+) bytes spill stores, (\\d+) bytes spill loads");
  const std::regex registers("Used (\\d+) registers"), shared("(\\d+) bytes smem");
  py::dict current;
  std::smatch match;
  for (std::string line; std::getline(report, line);) {
    if (std::regex_search(line, match, compiling)) {
      current = py::dict();
      kernels[py::make_tuple(match[1].str(), match[2].str())] = current;
    } else if (std::regex_search(line, match, stack)) {
      current["stack"] = std::stoi(match[1]);
      current["spills"] = std::stoi(match[2]) + std::stoi(match[3]);
    } else if (std::regex_search(line, match, registers)) {
      current["registers"] = std::stoi(match[1]);
      current["shared"] = std::regex_search(line, match, shared) ? std::stoi(match[1]) : 0;
    }
  }
  return kernels;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the native libraries were built with, and what this processor has.";
  m.def("build_info", &build_info, "Return compiler, versions, instruction sets and CUDA architectures of the build.");
  m.def("cpu_features", &cpu_features, "Return the vector extensions of this processor.");
  m.def("kernel_resources", &kernel_resources,
        "Return registers, stack, spilled and static shared bytes by (mangled kernel, architecture), as ptxas gave "
        "them.");
}
