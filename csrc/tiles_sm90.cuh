// Walks the tiles of S = X Y^T on Hopper: TMA and wgmma by CUTLASS's own mainloop, what becomes of a tile by an
// Epilogue.
//
// A CTA has three warpgroups. One warp of the first is the producer: it asks the copy engine for pieces of x and y,
// STAGES of them in flight. The other two are consumers that take turns, each with a whole tile of its own: while one
// multiplies, the other one runs its epilogue. CTAs are persistent, as many as the GPU holds, in clusters of two that share
// y.
//
// An epilogue (sweep.h, grad.h, sigmoid.h) is three steps, with a barrier of its warpgroup after each of the first two:
//     load     before the product is there: coefficients to shared memory
//     visit    the accumulators, 128 in a thread: statistics, or G in their place
//     finish   what needs all four warps: sums of columns
#pragma once

#include <algorithm>
#include <atomic>

#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_mma.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/numeric_conversion.h>
#include <cutlass/pipeline/pipeline.hpp>

#include "block.h"
#include "launch.cuh"

namespace flashcl {

using namespace cute;

constexpr int THREADS = 3 * 128;
// All threads start with 168 registers (65536 / 384, in steps of 8). A loop that issues copies does with 24, so that
// the consumers can have 240: as many as there are, for with fewer in the pool they would wait for ever.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS == 3 * 168);

template <class Element, class Args, class Epilogue, bool WRITES_G>
struct TilesKernel {
  // 64 of D in a step: 128 bytes, the widest swizzle of shared memory.
  using TileShape = Shape<Int<TILE>, Int<TILE>, _64>;
  using Cluster = Shape<Int<CLUSTER>, _1, _1>;
  // A stage is 32 KiB: 6 of them, or 5 beside a tile of G on its way out, fit the 227 KiB of a CTA. With 4 the copies are
  // too late: a quarter slower on an H200 (bench/NOTES.md).
  static constexpr int STAGES = WRITES_G ? 5 : 6;

  using Operand = Stride<int64_t, _1, int64_t>;  // row-major, K contiguous; the batch of 1 is CUTLASS's
  using TiledMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, TileShape, GMMA::Major::K, GMMA::Major::K>()));
  using Swizzled = GMMA::Layout_K_SW128_Atom<Element>;
  using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Mainloop = cutlass::gemm::collective::CollectiveMma<
      cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized<STAGES, Cluster, Pingpong>,
      TileShape, Element, Operand, Element, Operand, TiledMma,
      SM90_TMA_LOAD, Swizzled, void, identity,             // each CTA loads its x
      SM90_TMA_LOAD_MULTICAST, Swizzled, void, identity>;  // and half of the y of both
  using Pipeline = typename Mainloop::MainloopPipeline;
  // The consumers take turns at two things: the tensor cores and, where there is a G, the tile of shared memory that it
  // leaves from.
  using Order = cutlass::OrderedSequenceBarrier<WRITES_G ? 2 : 1, 2>;

  using GLayout = decltype(tile_to_shape(Swizzled{}, Shape<Int<TILE>, Int<TILE>>{}));
  using GMemory = decltype(make_layout(make_shape(0, 0), make_stride(int64_t{}, _1{})));
  using GTensor = decltype(make_tensor(make_gmem_ptr<Element>(nullptr), GMemory{}));
  using GStore = decltype(make_tma_copy(SM90_TMA_STORE{}, GTensor{}, GLayout{}));

  struct GTile {
    array_aligned<Element, cosize_v<GLayout>, 1024> tile;  // 1024: the period of the swizzle
  };
  struct Nothing {};

  struct Params {
    typename Mainloop::Params mainloop;
    cute::conditional_t<WRITES_G, GStore, Nothing> store;
    Args args;
  };

  struct alignas(1024) Shared {
    typename Mainloop::TensorStorage mainloop;
    cute::conditional_t<WRITES_G, GTile, Nothing> g;
    typename Epilogue::Shared epilogue[2];
    typename Pipeline::SharedStorage pipeline;
    typename Order::SharedStorage order;
  };
  static_assert(sizeof(Shared) <= 227 * 1024);

  // The accumulators lie in a thread as tile.h says: (e, h, j) of a wgmma, then b.
  using Accumulators = decltype(partition_fragment_C(TiledMma{}, take<0, 2>(TileShape{})));
  static_assert(is_same_v<typename Accumulators::layout_type,
                          Layout<Shape<Shape<_2, _2, _16>, _2, _1>, Stride<Stride<_1, _2, _4>, _64, _0>>>);

  static CUTLASS_DEVICE void run(const Params& params, Shared& shared) {
    const int group = cutlass::canonical_warp_group_idx(), thread = threadIdx.x % 128;
    const bool produces = cutlass::canonical_warp_idx_sync() == 0;

    if (produces && elect_one_sync()) {
      Mainloop::prefetch_tma_descriptors(params.mainloop);
      if constexpr (WRITES_G) {
        if (params.args.out.g) prefetch_tma_descriptor(params.store.get_tma_descriptor());
      }
    }
    typename Pipeline::Params roles;
    if (produces) roles.role = Pipeline::ThreadCategory::Producer;
    if (group > 0) roles.role = Pipeline::ThreadCategory::Consumer;
    roles.is_leader = thread == 0;
    roles.num_consumers = 128;  // a stage is consumed by one of the two warpgroups
    roles.num_producers = Mainloop::NumProducerThreadEvents;
    roles.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(shared.pipeline, roles, Cluster{});
    Order order(shared.order, {uint32_t(group - 1), 128});
    cluster_arrive_relaxed();  // no CTA may signal barriers of another one before they exist
    cluster_wait();

    if (group == 0) {
      cutlass::arch::warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
      if (produces) produce(params, shared, pipeline);
    } else {
      cutlass::arch::warpgroup_reg_alloc<CONSUMER_REGISTERS>();
      consume(params, shared, pipeline, order, group - 1, thread);
    }
  }

  // Which units a cluster works on: number `cluster`, cluster + clusters, ...
  static CUTLASS_DEVICE int cluster() { return blockIdx.x / CLUSTER; }
  static CUTLASS_DEVICE int clusters() { return gridDim.x / CLUSTER; }

  // One warp: x and y of every tile of this CTA, in order.
  static CUTLASS_DEVICE void produce(const Params& params, Shared& shared, Pipeline& pipeline) {
    const Block& block = params.args.block;
    const Schedule schedule = block.schedule();
    Mainloop mainloop;
    const auto operands = mainloop.load_init(make_shape(block.N, block.M, block.D, 1), params.mainloop);
    const int steps = size<3>(get<0>(operands)), rank = block_rank_in_cluster();
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (int unit = cluster(); unit < schedule.units(); unit += clusters()) {
      const Place tile = schedule.at(unit, rank);
      mainloop.load(params.mainloop, pipeline, state, operands, make_coord(tile.n, tile.m, _, 0),
                    make_coord_iterator(shape<3>(get<0>(operands))), steps, threadIdx.x % 32, rank, shared.mainloop);
      state.advance(steps);
    }
    mainloop.load_tail(pipeline, state);  // no CTA leaves while another one may still signal it
  }

  // A warpgroup: every other tile of this CTA.
  static CUTLASS_DEVICE void consume(const Params& params, Shared& shared, Pipeline& pipeline, Order& order, int turn,
                                     int thread) {
    const Block& block = params.args.block;
    const int units = block.schedule().units(), rank = block_rank_in_cluster();
    const int steps = ceil_div(block.D, size<2>(TileShape{}));
    Mainloop mainloop;
    typename Mainloop::PipelineState state;
    state.advance(turn * steps);
    for (int unit = cluster() + turn * clusters(); unit < units; unit += 2 * clusters()) {
      // Anew for every tile: reciprocals of these sizes would be kept beside the accumulators.
      const int N = Thread::forgotten(block.N), M = Thread::forgotten(block.M);
      const Schedule schedule = Block::schedule(N, M, block.triangular);
      const Place tile = schedule.at(unit, rank);
      const bool wanted = schedule.wanted(tile);
      Epilogue epilogue(params.args, {tile, thread / 32}, shared.epilogue[turn]);
      if (wanted) epilogue.load();

      Accumulators acc;  // (TILE, TILE) over the warpgroup
      order.wait();
      mainloop.mma(pipeline, state, acc, steps, thread, shared.mainloop, params.mainloop);
      order.arrive();
      mainloop.mma_tail(pipeline, state, steps);
      warpgroup_fence_operand(acc);  // its last products are awaited in mma_tail: nothing reads them before
      state.advance(2 * steps);

      if (!wanted) {
        if constexpr (WRITES_G) order.wait(), order.arrive();
        continue;
      }
      barrier(turn);  // coefficients are there
      epilogue.visit(acc);
      if constexpr (WRITES_G) {
        order.wait();  // the G of the other consumer has left shared memory
        if (params.args.out.g) stage(acc, shared.g, thread);
        barrier(turn);  // G of all four warps is there
        if (params.args.out.g && thread == 0) store(params, shared.g, tile);
      } else {
        barrier(turn);
      }
      epilogue.finish();  // column sums of all four warps are there
      if constexpr (WRITES_G) {
        if (thread == 0) tma_store_wait<0>();
        order.arrive();
      }
    }
  }

  // Of the 128 threads of a warpgroup. Not NamedBarrier::sync, which does not tell the compiler that memory changes.
  static CUTLASS_DEVICE void barrier(int turn) {
    asm volatile("bar.sync %0, 128;" ::"r"(cutlass::arch::NamedBarrier::ReservedNamedBarrierCount + turn) : "memory");
  }

  // G in 16 bits to shared memory, where the copy engine will see it.
  static CUTLASS_DEVICE void stage(const Accumulators& acc, GTile& g, int thread) {
    auto rounded = make_tensor<Element>(acc.layout());
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    CUTE_UNROLL
    for (int i = 0; i < size(acc); i += 2) {
      const auto pair = convert({acc(i), acc(i + 1)});
      rounded(i) = pair[0];
      rounded(i + 1) = pair[1];
    }
    const auto copy_to_shared = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, TiledMma{});
    const auto mine = copy_to_shared.get_thread_slice(thread);
    auto to = make_tensor(make_smem_ptr(g.tile.data()), GLayout{});  // (TILE, TILE)
    copy(copy_to_shared, mine.retile_S(rounded), mine.partition_D(to));
    cutlass::arch::fence_view_async_shared();
  }

  // One thread: G from shared memory to its place in the block.
  static CUTLASS_DEVICE void store(const Params& params, GTile& g, Place tile) {
    const Schedule schedule = params.args.block.schedule();
    const auto from = make_tensor(make_smem_ptr(g.tile.data()), GLayout{});
    const auto all = params.store.get_tma_tensor(make_shape(schedule.tiles_n * TILE, schedule.tiles_m * TILE));
    const auto to = local_tile(all, Shape<Int<TILE>, Int<TILE>>{}, make_coord(tile.n, tile.m));
    const auto engine = params.store.get_slice(_0{});
    copy(params.store, engine.partition_S(from), engine.partition_D(to));
    tma_store_arrive();
  }

  // ---- on the host ----

  static Params parameters(const Args& args) {
    const Block& b = args.block;
    Params params;
    params.args = args;
    const auto *x = static_cast<const Element*>(b.x), *y = static_cast<const Element*>(b.y);
    const typename Mainloop::Arguments operands{x, {b.x_stride, _1{}, 0}, y, {b.y_stride, _1{}, 0}};
    params.mainloop = Mainloop::to_underlying_arguments(make_shape(b.N, b.M, b.D, 1), operands, nullptr);
    if constexpr (WRITES_G) {
      if (args.out.g) {
        const Schedule s = b.schedule();
        const GMemory memory(make_shape(s.tiles_n * TILE, s.tiles_m * TILE), make_stride(args.out.stride, _1{}));
        const auto g = make_tensor(make_gmem_ptr(static_cast<Element*>(args.out.g)), memory);
        params.store = make_tma_copy(SM90_TMA_STORE{}, g, GLayout{});
      }
    }
    return params;
  }

  // Whether the driver took the descriptions of the tensors. CuTe only prints that it did not, and leaves them zero: a
  // launch with them would take the context down.
  static bool described(const Params& params) {
    const auto there = [](const auto& copy) {
      const auto* words = reinterpret_cast<const uint64_t*>(copy.get_tma_descriptor());
      return std::any_of(words, words + sizeof(TmaDescriptor) / 8, [](uint64_t word) { return word != 0; });
    };
    if constexpr (WRITES_G) {
      if (params.args.out.g && !there(params.store)) return false;
    }
    return there(params.mainloop.tma_load_a) && there(params.mainloop.tma_load_b);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(THREADS, 1) tiles(const __grid_constant__ typename Kernel::Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma and setmaxnreg are of sm_90a alone
  extern __shared__ __align__(1024) char memory[];
  Kernel::run(params, *reinterpret_cast<typename Kernel::Shared*>(memory));
#endif
}

// Whether tile.h's Fragment is where wgmma leaves its accumulators, by CuTe's account. For a test; runs on the host.
template <class Kernel>
bool fragment_is_right() {
  for (int thread = 0; thread < 128; ++thread) {
    const auto places = typename Kernel::TiledMma{}.get_slice(thread).partition_C(
        make_identity_tensor(take<0, 2>(typename Kernel::TileShape{})));
    for (int r = 0; r < Fragment::ROWS; ++r)
      for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk)
        for (int q = 0; q < Fragment::COLS; ++q) {
          const auto at = places(Fragment::place(r, chunk, q));
          if (get<0>(at) != Fragment::row(thread / 32, thread % 32, r)) return false;
          if (get<1>(at) != Fragment::col(thread % 32, chunk, q)) return false;
        }
  }
  return true;
}

// Clusters of a launch that the current device runs at a time. It is asked once: an answer takes longer than a launch.
//
// Not processors / 2: a part of the GPU whose processors are no multiple of 2 leaves one idle, and a cluster too many
// would begin its share of the units when all others are done.
template <class Kernel>
cudaError_t clusters_at_a_time(cudaLaunchConfig_t config, int* out) {
  static std::atomic<int> known[64];  // by device; 0: not asked yet
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaSetDevice(device)) return error;  // a thread that has launched nothing has no context yet
  std::atomic<int>& here = known[device % 64];
  if (here == 0) {
    constexpr auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t error = cudaFuncSetAttribute(tiles<Kernel>, limit, int(config.dynamicSmemBytes))) return error;
    int fitting;
    if (cudaError_t error = cudaOccupancyMaxActiveClusters(&fitting, tiles<Kernel>, &config)) return error;
    here = std::max(1, fitting);
  }
  *out = here;
  return cudaSuccess;
}

template <class Kernel, class Args>
cudaError_t launch_tiles(const Args& args, cudaStream_t stream) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {CLUSTER, 1, 1};
  constexpr size_t bytes = sizeof(typename Kernel::Shared);
  cudaLaunchConfig_t config{dim3(CLUSTER), dim3(THREADS), bytes, stream, &cluster, 1};
  int fitting;
  if (cudaError_t error = clusters_at_a_time<Kernel>(config, &fitting)) return cudaGetLastError(), error;
  config.gridDim.x = CLUSTER * std::min(args.block.schedule().units(), fitting);
  const auto params = Kernel::parameters(args);
  if (Kernel::described(params)) return queue(config, tiles<Kernel>, params);
  const cudaError_t earlier = cudaFree(nullptr);  // after a fault the driver describes no tensor: say what it was
  return cudaGetLastError(), earlier ? earlier : cudaErrorInvalidValue;
}

}  // namespace flashcl
