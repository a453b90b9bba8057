// The reason why kernels of this build cannot run on the current device: its driver, or no code for its architecture.

#ifdef __CUDACC__  // the host build of the tests has no driver

#include <stdexcept>
#include <string>

namespace {

__global__ void any_kernel() {}

// Errors of the pair of build and device; every other one may pass, such as a device without free memory.
bool is_lasting(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorUnsupportedPtxVersion:
      return true;
    default:
      return false;
  }
}

}  // namespace

namespace seemore {

// Empty where kernels run; throws for an error that may pass.
std::string unsupported_reason() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  cudaGetLastError();  // or the next launch would report it
  if (error == cudaSuccess) return "";
  if (!is_lasting(error)) throw std::runtime_error(cudaGetErrorString(error));
  return std::string("the driver or the GPU does not fit: ") + cudaGetErrorString(error);
}

}  // namespace seemore

#endif
