// Ampere and Hopper, as far as the kernels can tell: clusters of CTAs with shared memory, barriers, the copy engine and
// tensor cores.
//
// Whatever a GPU may do in any order is done in an order drawn from a seed: which warp runs and for how long, when a
// copy arrives, when a product reads its operands. What a GPU forbids and lets pass throws std::runtime_error here.
// Memory itself is in order: what a thread wrote all others see, but for the copy engine and wgmma, which ask for a
// fence.
#pragma once

#include <array>
#include <cstdlib>
#include <deque>
#include <functional>
#include <random>
#include <unordered_map>

#include "program.h"

namespace ptx {

struct Dim {
  int x = 1, y = 1, z = 1;
};

// What cuTensorMapEncodeTiled makes of its arguments: in place of the 128 bytes that only a GPU can read.
struct alignas(64) TensorMap {
  static constexpr uint64_t MAGIC = 0x70616d20726f736e;
  uint64_t magic, address;
  uint32_t rank, element_bytes;
  uint32_t swizzle;   // bytes of its period along a row: 0 (none), 32, 64 or 128
  uint32_t box[5];    // elements
  uint64_t dim[5];    // elements
  int64_t stride[4];  // bytes, of dimensions 1...
};

struct Free {  // of what malloc gave
  void operator()(void* p) const { std::free(p); }
};

struct Cta;
struct Warp;
struct Cluster;

struct Thread {
  std::unique_ptr<uint64_t[], Free> registers;  // tens of thousands, of which few are ever touched: not filled
  const uint64_t* constants;
  Warp* warp;
  Cta* cta;
  int tid, lane, pc = 0;
  bool waits = false;  // in a rendezvous, from which another thread frees it
  bool done = false;
  int cluster_phase = 0;
  int held_registers = 0;  // of setmaxnreg
  // Groups of copies, the last one still open: their numbers.
  std::vector<std::vector<int>> stores{1};  // from shared to global memory by the copy engine
  std::vector<std::vector<int>> loads{1};   // of cp.async

  template <class T>
  T get(int place) const {
    T out;
    __builtin_memcpy(&out, place >= 0 ? &registers[place] : &constants[~place], sizeof(T));
    return out;
  }
  template <class T>
  void set(int place, T value) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    registers[place] = bits;
  }
};

// A wgmma: of four warps together, 16 of its 64 rows each.
struct Product {
  const Instruction* at;
  uint64_t a, b;  // descriptors
  bool accumulate;
  int issued = 0;  // by how many of the warps
};

struct Warpgroup {
  std::vector<Warp*> warps;
  std::vector<Product> products;  // all of them, in order of issue
  size_t executed = 0;            // so many of them, in order

  bool can_execute() const { return executed < products.size() && products[executed].issued == 4; }
  void execute();  // the next one
};

struct Warp {
  Cta* cta;
  Warpgroup* group;
  int index;
  std::vector<Thread*> threads;
  size_t issued = 0;           // products
  bool fenced = false;         // since the last commit: registers may be handed to a product
  std::deque<size_t> commits;  // how many were issued at each commit that is not awaited yet
  // Accumulators of products that are not awaited, by register and lane. What reads the registers meanwhile reads NaN.
  std::unordered_map<int, std::array<float, 32>> flying;
};

struct MBarrier {
  int expected, pending;
  int64_t bytes = 0;
  int phase = 0;
};

struct Cta {
  Cluster* cluster;
  int rank;
  Dim index;
  // Shared memory, from SHARED_BASE. Aligned: kernels swizzle by the bits of addresses, generic ones too.
  std::unique_ptr<char, Free> memory;
  uint32_t bytes = 0;
  std::vector<int> unfenced;  // by byte: the thread + 1 whose write the copy engine may not see yet
  std::map<int, std::vector<std::pair<uint32_t, uint32_t>>> writes;  // by thread: such bytes, from and to
  std::unordered_map<uint32_t, MBarrier> mbarriers;
  std::map<int, std::vector<Thread*>> bars;  // who waits
  int spare_registers = 0;
  int running = 0;  // threads

  char* at(uint32_t address, size_t bytes);  // of shared memory; checked
  void wrote(int tid, uint32_t from, uint32_t bytes);
};

struct Copy {
  int number;
  std::function<void()> run;
};

struct Cluster {
  const Program* program;
  Dim grid, cluster, threads;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  std::deque<Thread> all;
  std::vector<Copy> copies;  // in flight
  int copy_number = 0;
  int arrived = 0, running = 0, phase = 0;  // of the barrier of the cluster
  uint64_t progress = 0;                    // steps that other threads may have waited for
  std::mt19937 random;

  bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(random) < p; }
  int start_copy(std::function<void()> run) { return copies.push_back({copy_number, run}), copy_number++; }
  void finish_copy(int number);
};

// Runs a kernel to its end. Threads of a cluster run in turns, clusters one after the other.
void launch(const Program& program, Dim grid, Dim cluster, Dim threads, size_t dynamic_shared, unsigned seed);

}  // namespace ptx
