// Queues a kernel of one argument: no synchronisation, no allocation, so that it may be captured in a graph.
#pragma once

#include <cuda_runtime.h>

namespace flashcl {

template <class Args>
cudaError_t queue(const cudaLaunchConfig_t& config, void (*kernel)(Args), const Args& args) {
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error) cudaGetLastError();  // it is returned; whoever asks the runtime next must not find it again
  return error;
}

}  // namespace flashcl
