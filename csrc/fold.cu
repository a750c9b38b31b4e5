// fold on any GPU: the order is in fold.h.
#include "kernels.h"
#include "launch.cuh"

namespace flashcl {
namespace {

constexpr int LINES = 32;  // a warp reads 128 bytes of a tile

__global__ void __launch_bounds__(LINES* FOLDERS) fold(const FoldArgs args) {
  __shared__ Statistic parts[LINES][FOLDERS];
  const int line = threadIdx.x % LINES, i = blockIdx.x * LINES + line, folder = threadIdx.x / LINES, k = blockIdx.y;
  if (i < args.n) parts[line][folder] = fold_part(args, k, i, folder);
  __syncthreads();
  if (i < args.n && folder == 0) fold_parts(args, k, i, parts[line]);
}

}  // namespace

int launch_fold(const FoldArgs& args, void* stream) {
  const dim3 blocks((args.n + LINES - 1) / LINES, args.K), threads(LINES * FOLDERS);
  return queue({blocks, threads, 0, static_cast<cudaStream_t>(stream)}, fold, args);
}

}  // namespace flashcl
