// rows on any GPU: what a lane does is in rows.h.
#include "kernels.h"
#include "launch.cuh"

namespace flashcl {
namespace {

constexpr int WARPS = 8;  // rows of a CTA

__device__ int64_t row_of_warp() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; }

__global__ void __launch_bounds__(32 * WARPS) partner_products(const PartnerArgs args) {
  const int64_t i = row_of_warp();
  if (i >= args.N) return;
  double sum = partner_part(args, i, threadIdx.x % 32);
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x % 32 == 0) args.out[i] = sum;
}

__global__ void __launch_bounds__(32 * WARPS) finish(const FinishArgs args) {
  const int64_t i = row_of_warp();
  if (i < args.R) finish_part(args, i, threadIdx.x % 32);
}

cudaLaunchConfig_t over(int64_t rows, void* stream) {
  return {dim3(unsigned((rows + WARPS - 1) / WARPS)), dim3(32 * WARPS), 0, static_cast<cudaStream_t>(stream)};
}

}  // namespace

int launch_partner_products(const PartnerArgs& args, void* stream) {
  return queue(over(args.N, stream), partner_products, args);
}

int launch_finish(const FinishArgs& args, void* stream) { return queue(over(args.R, stream), finish, args); }

}  // namespace flashcl
