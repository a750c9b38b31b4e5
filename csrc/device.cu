#include "device.h"

#include <cuda_runtime_api.h>

#define STRING_OF(...) #__VA_ARGS__
#define STRING(...) STRING_OF(__VA_ARGS__)

namespace flashcl {
namespace {

cudaError_t count_devices(int* count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) {
    *count = 0;
    cudaGetLastError();  // the runtime remembers the error; the check after a later launch must not find it
  }
  return error;
}

}  // namespace

const char* nvcc_version() {
  return STRING(__CUDACC_VER_MAJOR__) "." STRING(__CUDACC_VER_MINOR__) "." STRING(__CUDACC_VER_BUILD__);
}

int device_count() {
  int count;
  count_devices(&count);
  return count;
}

const char* device_status() {
  int count;
  return cudaGetErrorString(count_devices(&count));
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace flashcl
