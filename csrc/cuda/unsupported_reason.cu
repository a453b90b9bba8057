// Whether kernels of this build can run on the current device at all: driver new enough, code for its architecture.

#ifdef __CUDACC__  // the host build of the tests has no driver to ask

#include <string>

namespace {

__global__ void any_kernel() {}

}  // namespace

namespace seemore {

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  cudaGetLastError();  // or the next launch would report it
  return error == cudaSuccess ? "" : std::string("the driver or the GPU does not fit: ") + cudaGetErrorString(error);
}

}  // namespace seemore

#endif
