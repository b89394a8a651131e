// Included first by every kernel file: the CUDA runtime if nvcc compiles, emulation.h otherwise.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

namespace ticketops::cuda {

// Launches a kernel. Returns an error message, or null on success.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, void* stream, Arguments... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ticketops::cuda

#else
#include "emulation.h"
#endif
