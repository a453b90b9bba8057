// Launches that are recorded and not run: their kernels, blocks, threads and bytes of shared memory.

#include "cuda/common/launch.h"

extern "C" __attribute__((visibility("default"))) void record(int begin) {
  cuda_host::record.reset(begin ? new std::string : nullptr);
}

extern "C" __attribute__((visibility("default"))) const char* recorded() { return cuda_host::record->c_str(); }
