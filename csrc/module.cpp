// Binds csrc/ to Python as flashcl._C: the one file that knows Python, as the .cu files are the ones that know CUDA.
//
// A kernel is a .cu file with a plain C++ header beside it, and a file whose code only one GPU generation can run
// carries it as a suffix (sweep_sm90.cu). setup.py compiles whatever lies here, every file for every architecture of
// FLASHCL_ARCHS. Tensors arrive by DLPack and streams as integers, so nothing here depends on a version of torch.
#include <nanobind/nanobind.h>

#include <sstream>
#include <string>

#include "device.h"

namespace nb = nanobind;

namespace {

std::string compiler() {
#ifdef __clang__
  return __VERSION__;  // names itself
#else
  return "gcc " __VERSION__;
#endif
}

std::string nanobind_version() {
  return NB_TOSTRING(NB_VERSION_MAJOR) "." NB_TOSTRING(NB_VERSION_MINOR) "." NB_TOSTRING(NB_VERSION_PATCH);
}

std::string abi() {
  constexpr int major = Py_LIMITED_API >> 24, minor = Py_LIMITED_API >> 16 & 0xff;
  return "cp" + std::to_string(major) + std::to_string(minor) + "-abi3";
}

nb::list architectures() {
  nb::list out;
  std::istringstream archs(NB_TOSTRING(FLASHCL_ARCHS));
  for (std::string arch; std::getline(archs, arch, '_');) out.append(nb::str(arch.c_str()));
  return out;
}

nb::dict build_info() {
  nb::dict out;
  out["nvcc"] = flashcl::nvcc_version();
  out["architectures"] = architectures();
  out["compiler"] = compiler().c_str();
  out["nanobind"] = nanobind_version().c_str();
  out["abi"] = abi().c_str();
  return out;
}

}  // namespace

NB_MODULE(_C, m) {
  m.doc() = "CUDA kernels of flashcl.";
  m.def("build_info", &build_info, "What this binary was built with: nvcc, architectures, compiler, nanobind, abi.");
  m.def("device_count", &flashcl::device_count, "Number of GPUs; 0 without a GPU or a usable driver.");
  m.def("device_status", &flashcl::device_status, "Why device_count() is 0, as the CUDA runtime says it.");
}
