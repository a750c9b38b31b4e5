// As much of the CUDA runtime as flashcl._C calls, in the place of libcudart: one device, whose memory is that of the
// CPU. A launch runs the PTX that nvcc put beside the kernel, at once.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "machine.h"

namespace {

// In a function: kernels are registered while the library is loaded, maybe before its globals are there.
struct State {
  std::map<const void*, std::string> names;                       // of kernels, by their stubs on the host
  std::vector<std::string> modules, originals;                    // PTX
  std::map<std::string, std::unique_ptr<ptx::Program>> programs;  // by name; none: the modules are to be read
  std::string message = "no error";
  std::map<const void*, int> shared_limits;  // bytes, of kernels that asked for more than 48 KiB
  unsigned seed = 0;                         // of the next launch
  int clusters = 1;                          // that fit the device
};
State& state() {
  static State it;
  return it;
}

ptx::Program& program(const void* kernel) {
  State& all = state();
  if (all.programs.empty())
    for (const std::string& text : all.modules)
      for (auto& each : ptx::parse(text)) all.programs[each->name] = std::move(each);
  return *all.programs.at(all.names.at(kernel));
}

template <class Work>
cudaError_t guarded(Work work) {
  try {
    work();
    return cudaSuccess;
  } catch (const std::exception& error) {
    state().message = error.what();
    return cudaErrorLaunchFailure;
  }
}

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

uint32_t period(CUtensorMapSwizzle swizzle) {
  return swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
         : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
         : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                : 0;
}

// As the manual of cuTensorMapEncodeTiled asks.
void check(const ptx::TensorMap& map) {
  require(map.address % 16 == 0, "tensor map: misaligned");
  require(map.rank >= 1 && map.rank <= 5, "tensor map: rank");
  for (uint32_t d = 0; d < map.rank; ++d) {
    require(map.dim[d] > 0 && map.dim[d] <= uint64_t(1) << 32, "tensor map: size");
    require(map.box[d] > 0 && map.box[d] <= 256, "tensor map: box");
  }
  for (uint32_t d = 0; d + 1 < map.rank; ++d)
    require(map.stride[d] % 16 == 0 && map.stride[d] >= 0 && map.stride[d] < int64_t(1) << 40, "tensor map: stride");
  require(map.swizzle && map.box[0] * map.element_bytes == map.swizzle, "tensor map: a row of the box is no period");
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dim,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* element_stride,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  ptx::TensorMap map{};
  static_assert(sizeof(map) <= sizeof(*out));
  std::memset(out, 0, sizeof(*out));
  const cudaError_t error = guarded([&] {
    require(type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            "tensor map: not of 16 bits");
    require(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            "tensor map: interleaved, or not filled with zeros");
    require(reinterpret_cast<uint64_t>(out) % 64 == 0, "tensor map: misaligned itself");
    map.magic = ptx::TensorMap::MAGIC, map.address = reinterpret_cast<uint64_t>(address);
    map.rank = rank, map.element_bytes = 2, map.swizzle = period(swizzle);
    for (cuuint32_t d = 0; d < rank; ++d) {
      require(element_stride[d] == 1, "tensor map: element stride");
      map.dim[d] = dim[d], map.box[d] = box[d];
    }
    std::copy_n(stride, rank - 1, map.stride);
    check(map);
    std::memcpy(out, &map, sizeof(map));
  });
  return error ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

ptx::Dim extent(dim3 d) { return {int(d.x), int(d.y), int(d.z)}; }

ptx::Dim cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& d = config.attrs[i].val.clusterDim;
      return {int(d.x), int(d.y), int(d.z)};
    }
  return {1, 1, 1};
}

}  // namespace

extern "C" {

// ---- for the tests ----

// What draws the order of all that may come in any order, and how many clusters run at a time.
void machine_set(unsigned seed, int clusters) { state().seed = seed, state().clusters = clusters; }

// Puts `to` in the place of `from` everywhere in the PTX; says how many times.
int machine_edit(const char* from, const char* to) {
  int times = 0;
  for (std::string& text : state().modules)
    for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + std::strlen(to)), ++times)
      text.replace(at, std::strlen(from), to);
  state().programs.clear();
  return times;
}
void machine_restore() { state().modules = state().originals, state().programs.clear(); }

const char* machine_message() { return state().message.c_str(); }

// Launches a kernel of a PTX text. params are addresses of its first parameters, which have `sizes` bytes, the others
// are zero. 0, or there is a message.
int machine_launch(const char* text, const char* name, const int* grid, int threads, size_t shared,
                   const void* const* params, const size_t* sizes, size_t given) {
  static std::map<std::string, std::unique_ptr<ptx::Program>> known;  // by name and text
  return guarded([&] {
    auto& p = known[std::string(name) + text];
    if (!p)
      for (auto& each : ptx::parse(text))
        if (each->name == name) p = std::move(each);
    require(p != nullptr, "no such kernel");
    require(given <= p->layout.size(), "too many parameters");
    char* to = static_cast<char*>(p->parameters());
    std::fill_n(to, p->parameter_bytes, char(0));
    for (size_t i = 0; i < given; ++i) {
      require(sizes[i] == p->layout[i].size, "a parameter of another size");
      std::memcpy(to + p->layout[i].offset, params[i], sizes[i]);
    }
    ptx::launch(*p, {grid[0], grid[1], grid[2]}, {1, 1, 1}, {threads, 1, 1}, shared, state().seed++);
  });
}

// A tensor map of 128 bytes; dimensions and strides (in bytes, without the first) come with the contiguous one first.
int machine_tensor_map(void* out, void* address, int rank, int element_bytes, int period, const uint32_t* box,
                       const uint64_t* dim, const int64_t* stride) {
  return guarded([&] {
    ptx::TensorMap map{};
    map.magic = ptx::TensorMap::MAGIC, map.address = reinterpret_cast<uint64_t>(address);
    map.rank = rank, map.element_bytes = element_bytes, map.swizzle = period;
    std::copy_n(box, rank, map.box), std::copy_n(dim, rank, map.dim), std::copy_n(stride, rank - 1, map.stride);
    check(map);
    std::memset(out, 0, 128), std::memcpy(out, &map, sizeof(map));
  });
}

// ---- what nvcc's code calls when the library is loaded ----

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
    void* more;
  };
  struct Header {
    uint32_t magic;
    uint16_t version, size;
    uint64_t bytes;
  };
  const char* data = static_cast<Wrapper*>(wrapper)->data;
  Header header;
  std::memcpy(&header, data, sizeof(header));
  const char* const end = data + header.size + header.bytes;
  for (const char* at = data; at + 8 < end; ++at)  // PTX is text, and not compressed
    if (std::memcmp(at, ".version", 8) == 0) {
      state().originals.emplace_back(at);
      at += state().originals.back().size();
    }
  machine_restore();
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  state().names[host] = name;
}
// Of <<< >>>, which nobody here writes.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { std::abort(); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

// ---- the runtime ----

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaFree(void*) { return cudaSuccess; }
// A device for each number of clusters: callers may remember what fits a device.
cudaError_t cudaGetDevice(int* device) { return *device = state().clusters, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error ? state().message.c_str() : "no error"; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) state().shared_limits[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  return *clusters = state().clusters, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  return guarded([&] {
    ptx::Program& p = program(kernel);
    const auto limit = state().shared_limits.find(kernel);
    require(config->dynamicSmemBytes <= size_t(limit == state().shared_limits.end() ? 48 * 1024 : limit->second),
            "more shared memory than the kernel has asked for");
    std::memcpy(p.parameters(), args[0], p.parameter_bytes);
    ptx::launch(p, extent(config->gridDim), cluster_of(*config), extent(config->blockDim), config->dynamicSmemBytes,
                state().seed++);
  });
}

}  // extern "C"
