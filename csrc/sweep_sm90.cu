// sweep on Hopper: the algorithm is in sweep.h, the walk over the tiles in tiles_sm90.cuh.
#include "kernels.h"
#include "tiles_sm90.cuh"

namespace flashcl {
namespace {

template <class Element, class Program>
using Kernel = TilesKernel<Element, SweepArgs, Sweep<Thread, Program>, false>;

template <class Element>
cudaError_t launch(const SweepArgs& args, cudaStream_t stream) {
  return args.block.row_label ? launch_tiles<Kernel<Element, ByLabel>>(args, stream)
                              : launch_tiles<Kernel<Element, Different>>(args, stream);
}

}  // namespace

int launch_sweep(const SweepArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return args.block.half ? launch<cutlass::half_t>(args, s) : launch<cutlass::bfloat16_t>(args, s);
}

bool fragment_is_right() { return fragment_is_right<Kernel<cutlass::bfloat16_t, Different>>(); }

int shared_memory_of_sweep(bool by_label) {
  return by_label ? sizeof(Kernel<cutlass::bfloat16_t, ByLabel>::Shared)
                  : sizeof(Kernel<cutlass::bfloat16_t, Different>::Shared);
}

}  // namespace flashcl
