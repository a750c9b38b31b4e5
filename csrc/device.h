// What the CUDA toolkit and the driver say. Needs neither a GPU nor a driver.
#pragma once

namespace flashcl {

// Version of the nvcc that compiled the kernels, "major.minor.build".
const char* nvcc_version();

// Number of GPUs the driver offers; 0 without a GPU or a usable driver.
int device_count();

// The CUDA runtime's own words on the outcome of device_count(): why there is no GPU, or "no error".
const char* device_status();

// What a cudaError_t means.
const char* error_text(int error);

}  // namespace flashcl
