// The sigmoid family on Hopper: the algorithm is in sigmoid.h, the walk over the tiles in tiles_sm90.cuh.
#include "kernels.h"
#include "tiles_sm90.cuh"

namespace flashcl {
namespace {

// Programs drop pairs here; classes have no meaning for a sum.
template <class Element>
using Kernel = TilesKernel<Element, SigmoidArgs, Sigmoid<Thread, Different>, true>;

}  // namespace

int launch_sigmoid(const SigmoidArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return args.block.half ? launch_tiles<Kernel<cutlass::half_t>>(args, s)
                         : launch_tiles<Kernel<cutlass::bfloat16_t>>(args, s);
}

int shared_memory_of_sigmoid() { return sizeof(Kernel<cutlass::bfloat16_t>::Shared); }

}  // namespace flashcl
