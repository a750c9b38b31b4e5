// grad on Hopper: the algorithm is in grad.h, the walk over the tiles in tiles_sm90.cuh.
#include "kernels.h"
#include "tiles_sm90.cuh"

namespace flashcl {
namespace {

template <class Element, class Program>
using Kernel = TilesKernel<Element, GradArgs, Grad<Thread, Program>, true>;

template <class Element>
cudaError_t launch(const GradArgs& args, cudaStream_t stream) {
  return args.block.row_label ? launch_tiles<Kernel<Element, ByLabel>>(args, stream)
                              : launch_tiles<Kernel<Element, Different>>(args, stream);
}

}  // namespace

int launch_grad(const GradArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return args.block.half ? launch<cutlass::half_t>(args, s) : launch<cutlass::bfloat16_t>(args, s);
}

int shared_memory_of_grad(bool by_label) {
  return by_label ? sizeof(Kernel<cutlass::bfloat16_t, ByLabel>::Shared)
                  : sizeof(Kernel<cutlass::bfloat16_t, Different>::Shared);
}

}  // namespace flashcl
