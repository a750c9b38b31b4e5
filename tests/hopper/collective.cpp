// Operations of warps, CTAs and clusters: shuffles, barriers, the copy engine, wgmma.
//
// Layouts are those of the PTX manual: "Matrix fragments for wgmma", "Swizzling modes", "stmatrix".
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "machine.h"

namespace ptx {

void Cta::wrote(int tid, uint32_t from, uint32_t bytes) {
  std::fill_n(unfenced.begin() + from, bytes, tid + 1);
  writes[tid].emplace_back(from, from + bytes);
}

namespace {

[[noreturn]] void fail(const std::string& what, const Instruction& i) {
  throw std::runtime_error(what + ": " + i.text.substr(0, 160));
}

uint64_t address(Thread& t, const Instruction& i, int operand) {
  return t.get<uint64_t>(i.args[operand]) + t.get<uint64_t>(i.args[operand + 1]);
}

// Addresses of other CTAs of the cluster: their rank + 1 above 24 bits of address.
uint32_t remote(int rank, uint32_t address) { return uint32_t(rank + 1) << 24 | (address & 0xffffff); }
Cta& owner(Thread& t, uint32_t address) {
  const int rank = int(address >> 24) - 1;
  Cta& cta = rank < 0 ? *t.cta : *t.cta->cluster->ctas.at(rank);
  if (cta.running == 0) throw std::runtime_error("a CTA that has left is signalled");
  return cta;
}

// ---- what a warp does together ----

// Whether all of them stand at this instruction; then they are free, behind it.
bool together(Thread& t, uint32_t mask) {
  t.waits = true;
  const auto& lanes = t.warp->threads;
  for (size_t lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1)
      if (lane >= lanes.size() || lanes[lane]->done || !lanes[lane]->waits || lanes[lane]->pc != t.pc) return false;
  for (size_t lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) lanes[lane]->waits = false, ++lanes[lane]->pc;
  ++t.cta->cluster->progress;
  return true;
}

template <class Each>
Then collective(Thread& t, const Instruction&, uint32_t mask, Each each) {
  if (!(mask >> t.lane & 1)) throw std::runtime_error("a lane that is not in its own mask");
  if (!together(t, mask)) return Then::WAITS;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) each(*t.warp->threads[lane]);
  return Then::JUMPED;
}

constexpr uint32_t ALL = ~0u;

// shfl.sync d|p, a, b, c, mask
template <class Source>
Then shuffle(Thread& t, const Instruction& i, Source source) {
  const int with_p = i.args.size() == 6, a = 1 + with_p;
  const uint32_t mask = t.get<uint32_t>(i.args.back());
  std::array<uint32_t, 32> before{};
  for (Thread* lane : t.warp->threads) before[lane->lane] = lane->get<uint32_t>(i.args[a]);
  return collective(t, i, mask, [&](Thread& lane) {
    const uint32_t b = lane.get<uint32_t>(i.args[a + 1]), c = lane.get<uint32_t>(i.args[a + 2]);
    const uint32_t segment = c >> 8 & 31, last = (lane.lane & segment) | (c & 31 & ~segment);
    uint32_t j = source(lane.lane, b, segment);
    const bool inside = j <= last;
    if (!inside) j = lane.lane;
    if (!(mask >> j & 1)) fail("a shuffle from a lane that is not there", i);
    lane.set<uint32_t>(i.args[0], before[j]);
    if (with_p) lane.set<bool>(i.args[1], inside);
  });
}

Then vote_any(Thread& t, const Instruction& i) {
  const uint32_t mask = t.get<uint32_t>(i.args[2]);
  bool any = false;
  for (Thread* lane : t.warp->threads) any |= (mask >> lane->lane & 1) && lane->get<bool>(i.args[1]);
  return collective(t, i, mask, [&](Thread& lane) { lane.set<bool>(i.args[0], any); });
}

Then elect(Thread& t, const Instruction& i) {
  const uint32_t mask = t.get<uint32_t>(i.args[2]), first = __builtin_ctz(mask);
  return collective(t, i, mask, [&](Thread& lane) {
    lane.set<uint32_t>(i.args[0], first);
    lane.set<bool>(i.args[1], lane.lane == int(first));
  });
}

// Four 8 x 8 matrices: lane 8 m + r has the address of row r of matrix m; lane 4 r + c holds columns 2 c and 2 c + 1.
Then store_matrices(Thread& t, const Instruction& i) {
  std::array<uint32_t, 32> rows;
  for (Thread* lane : t.warp->threads) rows[lane->lane] = uint32_t(address(*lane, i, 0));
  return collective(t, i, ALL, [&](Thread& lane) {
    for (int m = 0; m < 4; ++m) {
      const uint32_t row = rows[8 * m + lane.lane / 4], to = row + 4 * (lane.lane % 4),
                     value = lane.get<uint32_t>(i.args[2 + m]);
      if (row % 16) fail("misaligned", i);
      __builtin_memcpy(lane.cta->at(to, 4), &value, 4);
      lane.cta->wrote(lane.tid, to - SHARED_BASE, 4);
    }
  });
}

// ---- registers ----

template <bool MORE>
Then set_registers(Thread& t, const Instruction& i) {
  const int wanted = t.get<int>(i.args[0]), more = wanted - t.warp_registers;
  if ((more > 0) != MORE) fail("registers in the wrong direction", i);
  if (more > t.cta->spare_registers) return Then::WAITS;
  t.cta->spare_registers -= more, t.warp_registers = wanted, ++t.cta->cluster->progress;
  return Then::NEXT;
}

// ---- barriers ----

Then bar_sync(Thread& t, const Instruction& i) {
  const int id = t.get<int>(i.args[0]),
            count = i.args.size() > 1 ? t.get<int>(i.args[1]) : int(t.cta->cluster->threads.x);
  if (id < 0 || id > 15 || count % 32) fail("no such barrier", i);
  auto& waiting = t.cta->bars[id];
  t.waits = true;
  waiting.push_back(&t);
  if (int(waiting.size()) < count) return Then::WAITS;
  for (Thread* each : waiting) each->waits = false, ++each->pc;
  waiting.clear();
  ++t.cta->cluster->progress;
  return Then::JUMPED;
}

Then cluster_arrive(Thread& t, const Instruction&) {
  Cluster& c = *t.cta->cluster;
  t.cluster_phase = c.phase + 1;
  if (++c.arrived == c.running) c.arrived = 0, ++c.phase, ++c.progress;
  return Then::NEXT;
}

Then cluster_wait(Thread& t, const Instruction&) {
  return t.cta->cluster->phase >= t.cluster_phase ? Then::NEXT : Then::WAITS;
}

MBarrier& mbarrier(Cta& cta, uint32_t address) {
  const auto found = cta.mbarriers.find(address & 0xffffff);
  if (found == cta.mbarriers.end()) throw std::runtime_error("no mbarrier at " + std::to_string(address & 0xffffff));
  return found->second;
}

void settle(Cta& cta, MBarrier& b) {
  if (b.pending < 0) throw std::runtime_error("more arrivals than an mbarrier expects");
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected, ++cta.cluster->progress;
}

Then mbarrier_init(Thread& t, const Instruction& i) {
  const uint32_t at = uint32_t(address(t, i, 0));
  t.cta->at(at, 8);
  const int expected = t.get<int>(i.args[2]);
  t.cta->mbarriers[at] = {expected, expected};
  return Then::NEXT;
}

void arrive(Thread& t, uint32_t at, int64_t bytes) {
  Cta& cta = owner(t, at);
  MBarrier& b = mbarrier(cta, at);
  --b.pending, b.bytes += bytes;
  settle(cta, b);
}

// mbarrier.try_wait.parity p, [address], parity: whether the phase of this parity is over.
Then mbarrier_wait(Thread& t, const Instruction& i) {
  const bool over = mbarrier(*t.cta, uint32_t(address(t, i, 1))).phase != t.get<int>(i.args[3]);
  t.set<bool>(i.args[0], over);
  return over ? Then::NEXT : Then::YIELDS;
}

// ---- the copy engine ----

const TensorMap& tensor_map(Thread& t, const Instruction& i, int operand) {
  const uint64_t at = address(t, i, operand);
  const auto& map = *reinterpret_cast<const TensorMap*>(at);
  if (at % 64 || map.magic != TensorMap::MAGIC) fail("no tensor map", i);
  return map;
}

// 16-byte pieces of shared memory change places within each 1024 bytes, by the bits of their row.
uint32_t swizzled(uint32_t address, uint32_t period) {
  const uint32_t mask = period == 128 ? 7 : period == 64 ? 3 : period == 32 ? 1 : 0;
  return address ^ (address >> 7 & mask) << 4;
}

// Calls each(where an element lies in memory, or null beyond the edges, where in shared memory).
template <class Each>
void over_box(const TensorMap& map, const std::array<int, 5>& at, uint32_t shared, Each each) {
  uint32_t elements = 1;
  for (uint32_t d = 0; d < map.rank; ++d) elements *= map.box[d];
  for (uint32_t e = 0; e < elements; ++e) {
    bool inside = true;
    int64_t offset = 0;
    for (uint32_t d = 0, rest = e; d < map.rank; rest /= map.box[d], ++d) {
      const int64_t x = int64_t(at[d]) + rest % map.box[d];
      inside &= x >= 0 && x < int64_t(map.dim[d]);
      offset += x * (d == 0 ? int64_t(map.element_bytes) : map.stride[d - 1]);
    }
    each(inside ? reinterpret_cast<char*>(map.address + offset) : nullptr,
         swizzled(shared + e * map.element_bytes, map.swizzle));
  }
}

uint32_t bytes_of_box(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

template <int RANK>
std::array<int, 5> coordinates(Thread& t, const Instruction& i, int operand, const TensorMap& map) {
  if (map.rank != RANK) fail("a tensor map of another rank", i);
  std::array<int, 5> out{};
  for (int d = 0; d < RANK; ++d) out[d] = t.get<int>(i.args[operand + d]);
  return out;
}

void fill(Cta& cta, const TensorMap& map, const std::array<int, 5>& at, uint32_t to) {
  if (cta.running == 0) throw std::runtime_error("a copy comes to a CTA that has left");
  over_box(map, at, to, [&](const char* from, uint32_t here) {
    char* place = cta.at(here, map.element_bytes);
    from ? std::copy_n(from, map.element_bytes, place) : std::fill_n(place, map.element_bytes, char(0));
  });
}

void drain(Cta& cta, const TensorMap& map, const std::array<int, 5>& at, uint32_t from) {
  over_box(map, at, from, [&](char* place, uint32_t here) {
    const int* writer = &cta.unfenced[here - SHARED_BASE];
    for (uint32_t byte = 0; byte < map.element_bytes; ++byte)
      if (writer[byte])
        throw std::runtime_error("the copy engine reads what thread " + std::to_string(writer[byte] - 1) +
                                 " wrote without a fence");
    if (place) std::copy_n(cta.at(here, map.element_bytes), map.element_bytes, place);
  });
}

// [shared], [map, {...}], [mbarrier], mask of CTAs, cache policy
template <int RANK>
Then copy_in(Thread& t, const Instruction& i) {
  const uint32_t to = uint32_t(address(t, i, 0)) & 0xffffff, barrier = uint32_t(address(t, i, 4 + RANK)) & 0xffffff;
  const TensorMap& map = tensor_map(t, i, 2);
  const auto at = coordinates<RANK>(t, i, 4, map);
  const uint32_t ctas = t.get<uint16_t>(i.args[6 + RANK]);
  if (to % 128) fail("misaligned", i);
  Cluster& c = *t.cta->cluster;
  c.start_copy([=, &c, &map] {
    for (size_t rank = 0; rank < c.ctas.size(); ++rank) {
      if (!(ctas >> rank & 1)) continue;
      Cta& cta = *c.ctas[rank];
      fill(cta, map, at, to);
      MBarrier& b = mbarrier(cta, barrier);
      b.bytes -= bytes_of_box(map);
      settle(cta, b);
    }
  });
  return Then::NEXT;
}

// [map, {...}], [shared]
template <int RANK>
Then copy_out(Thread& t, const Instruction& i) {
  const uint32_t from = uint32_t(address(t, i, 2 + RANK));
  const TensorMap& map = tensor_map(t, i, 0);
  const auto at = coordinates<RANK>(t, i, 2, map);
  if (from % 128) fail("misaligned", i);
  Cta& cta = *t.cta;
  t.stores.back().push_back(cta.cluster->start_copy([=, &cta, &map] { drain(cta, map, at, from); }));
  return Then::NEXT;
}

Then copies_wait(Thread& t, const Instruction& i) {
  const size_t may_fly = t.get<uint32_t>(i.args[0]);
  while (t.stores.size() - 1 > may_fly) {  // all but the open group
    for (int number : t.stores.front()) t.cta->cluster->finish_copy(number);
    t.stores.erase(t.stores.begin());
  }
  return Then::NEXT;
}

Then fence_for_copies(Thread& t, const Instruction&) {
  auto& mine = t.cta->writes[t.tid];
  for (const auto& [from, to] : mine)
    for (uint32_t byte = from; byte < to; ++byte)
      if (t.cta->unfenced[byte] == t.tid + 1) t.cta->unfenced[byte] = 0;
  mine.clear();
  return Then::NEXT;
}

// ---- wgmma m64n128k16, operands in shared memory, K contiguous, swizzled by 128 bytes ----

constexpr int ACCUMULATORS = 64, ROWS = 64, COLUMNS = 128, DEPTH = 16;
constexpr uint32_t IN_FLIGHT = 0x7fdeadad;  // a NaN

// {64 accumulators}, a, b, scale-d, scale-a, scale-b, transpose a, transpose b
Then multiply(Thread& t, const Instruction& i) {
  const int* more = &i.args[ACCUMULATORS];
  if (i.args.size() != ACCUMULATORS + 7) fail("not the operands of wgmma", i);
  if (t.get<int>(more[3]) != 1 || t.get<int>(more[4]) != 1 || t.get<int>(more[5]) || t.get<int>(more[6]))
    fail("signs or transposes", i);
  const Product product{&i, t.get<uint64_t>(more[0]), t.get<uint64_t>(more[1]), t.get<bool>(more[2])};
  if (!together(t, ALL)) return Then::WAITS;
  Warp& warp = *t.warp;
  for (Thread* lane : warp.threads)
    if (lane->get<uint64_t>(more[0]) != product.a || lane->get<uint64_t>(more[1]) != product.b ||
        lane->get<bool>(more[2]) != product.accumulate)
      fail("lanes that disagree", i);
  for (int r = 0; r < ACCUMULATORS; ++r) {
    auto [flying, fresh] = warp.flying.try_emplace(i.args[r]);
    for (Thread* lane : warp.threads) {
      if ((lane->get<uint32_t>(i.args[r]) == IN_FLIGHT) == fresh)
        fail("an accumulator changed while its product was under way", i);
      if (fresh) flying->second[lane->lane] = lane->get<float>(i.args[r]);
      lane->set<uint32_t>(i.args[r], IN_FLIGHT);
    }
  }
  auto& products = warp.group->products;
  if (warp.issued == products.size()) products.push_back(product);
  Product& shared = products[warp.issued++];
  if (shared.at != product.at || shared.a != product.a || shared.b != product.b ||
      shared.accumulate != product.accumulate)
    fail("warps that disagree", i);
  ++shared.issued;
  return Then::JUMPED;
}

Then commit(Thread& t, const Instruction& i) {
  return collective(t, i, ALL, [](Thread& lane) {
    if (lane.lane == 0) lane.warp->commits.push_back(lane.warp->issued);
  });
}

void land(Warp& warp, const Instruction& i) {
  for (auto& [place, values] : warp.flying)
    for (Thread* lane : warp.threads) {
      if (lane->get<uint32_t>(place) != IN_FLIGHT) fail("an accumulator changed while its product was under way", i);
      lane->set<float>(place, values[lane->lane]);
    }
  warp.flying.clear();
}

Then products_wait(Thread& t, const Instruction& i) {
  const size_t may_fly = t.get<uint32_t>(i.args[0]), flies = t.warp->commits.size();
  Warpgroup& group = *t.warp->group;
  const size_t wanted = flies > may_fly ? t.warp->commits[flies - may_fly - 1] : 0;
  while (group.executed < wanted && group.can_execute()) group.execute();
  if (group.executed < wanted) return Then::WAITS;  // for the other warps
  return collective(t, i, ALL, [&](Thread& lane) {
    if (lane.lane != 0) return;
    auto& commits = lane.warp->commits;
    while (commits.size() > may_fly) commits.pop_front();
    if (commits.empty() && group.executed == lane.warp->issued) land(*lane.warp, i);
  });
}

// Element (row, k) of an operand that a descriptor tells of.
float element(Cta& cta, uint64_t descriptor, int row, int k, bool half) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) throw std::runtime_error("wgmma: not swizzled by 128 bytes");
  uint16_t bits;
  __builtin_memcpy(&bits, cta.at(swizzled(start + row / 8 * eight_rows + row % 8 * 128 + 2 * k, 128), 2), 2);
  return half ? __half2float(__half_raw{bits}) : __bfloat162float(__nv_bfloat16_raw{bits});
}

// Tensor cores cut off what a float32 does not hold.
float towards_zero(double x) {
  const float y = float(x);
  return std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

}  // namespace

void Warpgroup::execute() {
  const Product& product = products[executed++];
  const bool half = product.at->text.find(".f32.f16.f16") != std::string::npos;
  Cta& cta = *warps[0]->cta;
  double a[ROWS][DEPTH], b[DEPTH][COLUMNS], sums[ROWS][COLUMNS] = {};
  for (int k = 0; k < DEPTH; ++k) {
    for (int row = 0; row < ROWS; ++row) a[row][k] = element(cta, product.a, row, k, half);
    for (int col = 0; col < COLUMNS; ++col) b[k][col] = element(cta, product.b, col, k, half);
  }
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < DEPTH; ++k)
      for (int col = 0; col < COLUMNS; ++col) sums[row][col] += a[row][k] * b[k][col];
  for (int warp = 0; warp < 4; ++warp)
    for (int r = 0; r < ACCUMULATORS; ++r) {
      auto& values = warps[warp]->flying.at(product.at->args[r]);
      for (int lane = 0; lane < 32; ++lane) {
        const int row = 16 * warp + lane / 4 + r / 2 % 2 * 8, col = r / 4 * 8 + lane % 4 * 2 + r % 2;
        values[lane] = towards_zero(sums[row][col] + (product.accumulate ? values[lane] : 0.0f));
      }
    }
}

std::map<std::string, Handler> hopper_operations() {
  const Handler nothing = [](Thread&, const Instruction&) { return Then::NEXT; };
  const std::string product = "wgmma.mma_async.sync.aligned.m64n128k16.f32.";
  return {
      {"shfl.sync.bfly.b32",
       [](Thread& t, const Instruction& i) {
         return shuffle(t, i, [](uint32_t lane, uint32_t b, uint32_t) { return lane ^ b; });
       }},
      {"shfl.sync.idx.b32",
       [](Thread& t, const Instruction& i) {
         return shuffle(t, i, [](uint32_t lane, uint32_t b, uint32_t s) { return (lane & s) | (b & ~s & 31); });
       }},
      {"vote.sync.any.pred", vote_any},
      {"elect.sync", elect},
      {"stmatrix.sync.aligned.x4.m8n8.shared.b16", store_matrices},
      {"setmaxnreg.inc.sync.aligned.u32", set_registers<true>},
      {"setmaxnreg.dec.sync.aligned.u32", set_registers<false>},
      {"bar.sync", bar_sync},
      {"barrier.cluster.arrive.relaxed.aligned", cluster_arrive},
      {"barrier.cluster.wait.aligned", cluster_wait},
      {"fence.mbarrier_init.release.cluster", nothing},
      {"fence.proxy.async.shared::cta", fence_for_copies},
      {"prefetch.tensormap", nothing},
      {"mapa.shared::cluster.u32",
       [](Thread& t, const Instruction& i) {
         t.set<uint32_t>(i.args[0], remote(t.get<int>(i.args[2]), t.get<uint32_t>(i.args[1])));
         return Then::NEXT;
       }},
      {"mbarrier.init.shared::cta.b64", mbarrier_init},
      {"mbarrier.arrive.shared::cta.b64",
       [](Thread& t, const Instruction& i) { return arrive(t, uint32_t(address(t, i, 1)), 0), Then::NEXT; }},
      {"mbarrier.arrive.shared::cluster.b64",
       [](Thread& t, const Instruction& i) { return arrive(t, uint32_t(address(t, i, 1)), 0), Then::NEXT; }},
      {"mbarrier.arrive.expect_tx.shared::cta.b64",
       [](Thread& t, const Instruction& i) {
         return arrive(t, uint32_t(address(t, i, 1)), t.get<uint32_t>(i.args[3])), Then::NEXT;
       }},
      {"mbarrier.try_wait.parity.shared::cta.b64", mbarrier_wait},
      {"cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint",
       copy_in<3>},
      {"cp.async.bulk.tensor.2d.global.shared::cta.bulk_group", copy_out<2>},
      {"cp.async.bulk.commit_group", [](Thread& t, const Instruction&) { return t.stores.emplace_back(), Then::NEXT; }},
      {"cp.async.bulk.wait_group.read", copies_wait},
      {product + "bf16.bf16", multiply},
      {product + "f16.f16", multiply},
      {"wgmma.fence.sync.aligned", nothing},
      {"wgmma.commit_group.sync.aligned", commit},
      {"wgmma.wait_group.sync.aligned", products_wait},
  };
}

}  // namespace ptx
