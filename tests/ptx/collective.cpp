// Operations of warps, CTAs and clusters: shuffles, barriers, the copy engine, wgmma.
//
// Layouts are those of the PTX manual: "Matrix fragments for wgmma", "Swizzling modes", "stmatrix".
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
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

// N matrices of 8 x 8: lane 8 m + r has the address of row r of matrix m, lane 4 r + c what is in row r at columns 2 c
// and 2 c + 1. TRANSPOSED: rows and columns of what lanes have change places.
template <int N, bool TRANSPOSED>
Then store_matrices(Thread& t, const Instruction& i) {
  std::array<uint32_t, 32> rows;
  for (Thread* lane : t.warp->threads) rows[lane->lane] = uint32_t(address(*lane, i, 0));
  return collective(t, i, ALL, [&](Thread& lane) {
    for (int m = 0; m < N; ++m)
      for (int e = 0; e < 2; ++e) {
        int row = lane.lane / 4, col = lane.lane % 4 * 2 + e;
        if (TRANSPOSED) std::swap(row, col);
        const uint32_t to = rows[8 * m + row] + 2 * col;
        const uint16_t value = uint16_t(lane.get<uint32_t>(i.args[2 + m]) >> 16 * e);
        if (rows[8 * m + row] % 16) fail("misaligned", i);
        __builtin_memcpy(lane.cta->at(to, 2), &value, 2);
        lane.cta->wrote(lane.tid, to - SHARED_BASE, 2);
      }
  });
}

// The other way round.
template <int N, bool TRANSPOSED>
Then load_matrices(Thread& t, const Instruction& i) {
  std::array<uint32_t, 32> rows;
  for (Thread* lane : t.warp->threads) rows[lane->lane] = uint32_t(address(*lane, i, N));
  return collective(t, i, ALL, [&](Thread& lane) {
    for (int m = 0; m < N; ++m) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        int row = lane.lane / 4, col = lane.lane % 4 * 2 + e;
        if (TRANSPOSED) std::swap(row, col);
        if (rows[8 * m + row] % 16) fail("misaligned", i);
        __builtin_memcpy(&pair[e], lane.cta->at(rows[8 * m + row] + 2 * col, 2), 2);
      }
      lane.set<uint32_t>(i.args[m], uint32_t(pair[1]) << 16 | pair[0]);
    }
  });
}

template <class T, bool LARGEST>
Then extreme(Thread& t, const Instruction& i) {
  const uint32_t mask = t.get<uint32_t>(i.args[2]);
  T out = t.get<T>(i.args[1]);
  for (Thread* lane : t.warp->threads)
    if (mask >> lane->lane & 1)
      out = LARGEST ? std::max(out, lane->get<T>(i.args[1])) : std::min(out, lane->get<T>(i.args[1]));
  return collective(t, i, mask, [&](Thread& lane) { lane.set<T>(i.args[0], out); });
}

// ---- registers ----

template <bool MORE>
Then set_registers(Thread& t, const Instruction& i) {
  const int wanted = t.get<int>(i.args[0]), more = wanted - t.held_registers;
  if ((more > 0) != MORE) fail("registers in the wrong direction", i);
  if (more > t.cta->spare_registers) return Then::WAITS;
  t.cta->spare_registers -= more, t.held_registers = wanted, ++t.cta->cluster->progress;
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

constexpr uint64_t MBARRIER = 0x7265697272616220;  // lies where an mbarrier does: nothing else may be written there

MBarrier& mbarrier(Cta& cta, uint32_t address) {
  address &= 0xffffff;
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end()) throw std::runtime_error("no mbarrier at " + std::to_string(address));
  if (std::memcmp(cta.at(address, 8), &MBARRIER, 8) != 0) throw std::runtime_error("an mbarrier was written over");
  return found->second;
}

void settle(Cta& cta, MBarrier& b) {
  if (b.pending < 0) throw std::runtime_error("more arrivals than an mbarrier expects");
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected, ++cta.cluster->progress;
}

Then mbarrier_init(Thread& t, const Instruction& i) {
  const uint32_t at = uint32_t(address(t, i, 0));
  if (at % 8) fail("misaligned", i);
  std::memcpy(t.cta->at(at, 8), &MBARRIER, 8);
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

// Shared memory as the copy engine and wgmma read it: what threads have written is there only behind a fence.
const char* fenced(Cta& cta, uint32_t address, uint32_t bytes) {
  const char* place = cta.at(address, bytes);
  const int* writer = &cta.unfenced[address - SHARED_BASE];
  for (uint32_t byte = 0; byte < bytes; ++byte)
    if (writer[byte])
      throw std::runtime_error("what thread " + std::to_string(writer[byte] - 1) + " wrote is read without a fence");
  return place;
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
    const char* value = fenced(cta, here, map.element_bytes);
    if (place) std::copy_n(value, map.element_bytes, place);
  });
}

// [shared], [map, {...}], [mbarrier], and where it goes to several CTAs: their mask, a cache policy
template <int RANK, bool MULTICAST>
Then copy_in(Thread& t, const Instruction& i) {
  const uint32_t to = uint32_t(address(t, i, 0)) & 0xffffff, barrier = uint32_t(address(t, i, 4 + RANK)) & 0xffffff;
  const TensorMap& map = tensor_map(t, i, 2);
  const auto at = coordinates<RANK>(t, i, 4, map);
  const uint32_t ctas = MULTICAST ? t.get<uint16_t>(i.args[6 + RANK]) : 1u << t.cta->rank;
  Cluster& c = *t.cta->cluster;
  if (to % 128) fail("misaligned", i);
  if (ctas >> c.ctas.size()) fail("to a CTA that is not there", i);
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

// cp.async [shared], [global], bytes, bytes that are there: the rest becomes zeros
Then copy_some(Thread& t, const Instruction& i) {
  const uint32_t to = uint32_t(address(t, i, 0)), bytes = t.get<uint32_t>(i.args[4]),
                 there = i.args.size() > 5 ? t.get<uint32_t>(i.args[5]) : bytes;
  const char* from = reinterpret_cast<const char*>(address(t, i, 2));
  if (to % bytes || (there && reinterpret_cast<uint64_t>(from) % bytes)) fail("misaligned", i);
  if (there > bytes) fail("more than there is room for", i);
  Cta& cta = *t.cta;
  const int tid = t.tid;
  t.loads.back().push_back(cta.cluster->start_copy([=, &cta] {
    std::fill(std::copy_n(from, there, cta.at(to, bytes)), cta.at(to, bytes) + bytes, char(0));
    cta.wrote(tid, to - SHARED_BASE, bytes);
  }));
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

// Until no more than the last few of the groups are under way.
template <std::vector<std::vector<int>> Thread::* GROUPS>
Then copies_wait(Thread& t, const Instruction& i) {
  const size_t may_fly = t.get<uint32_t>(i.args[0]);
  auto& groups = t.*GROUPS;
  while (groups.size() - 1 > may_fly) {  // all but the open one
    for (int number : groups.front()) t.cta->cluster->finish_copy(number);
    groups.erase(groups.begin());
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

// ---- products ----

float to_float(uint16_t bits, bool half) {
  return half ? __half2float(__half_raw{bits}) : __bfloat162float(__nv_bfloat16_raw{bits});
}

// Tensor cores cut off what a float32 does not hold.
float towards_zero(double x) {
  const float y = float(x);
  return std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

// Of a 16 x 16 operand lane 4 r + q holds rows r and r + 8, each at k = 2 q, 2 q + 1 and 8 further, in four registers.
void spread(int lane, const uint32_t* registers, bool half, double (&to)[16][16]) {
  for (int part = 0; part < 4; ++part)
    for (int e = 0; e < 2; ++e)
      to[lane / 4 + part % 2 * 8][lane % 4 * 2 + part / 2 * 8 + e] = to_float(registers[part] >> 16 * e & 0xffff, half);
}

// mma m16n8k16 {d}, {a}, {b}, {c}. Of b lane 4 r + q holds column r, at k as of a; of c and d rows r and r + 8 at
// columns 2 q and 2 q + 1.
template <bool HALF>
Then multiply_16_8(Thread& t, const Instruction& i) {
  if (!together(t, ALL)) return Then::WAITS;
  double a[16][16], b[16][8];
  for (Thread* lane : t.warp->threads) {
    uint32_t registers[4];
    for (int part = 0; part < 4; ++part) registers[part] = lane->get<uint32_t>(i.args[4 + part]);
    spread(lane->lane, registers, HALF, a);
    for (int part = 0; part < 2; ++part)
      for (int e = 0; e < 2; ++e)
        b[lane->lane % 4 * 2 + part * 8 + e][lane->lane / 4] =
            to_float(lane->get<uint32_t>(i.args[8 + part]) >> 16 * e & 0xffff, HALF);
  }
  for (Thread* lane : t.warp->threads)
    for (int part = 0; part < 4; ++part) {
      const int row = lane->lane / 4 + part / 2 * 8, col = lane->lane % 4 * 2 + part % 2;
      double sum = lane->get<float>(i.args[10 + part]);
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      lane->set<float>(i.args[part], towards_zero(sum));
    }
  return Then::JUMPED;
}

// ---- wgmma m64nNk16, operands in shared memory, K contiguous, swizzled by 128 bytes; the first one maybe in registers
// ----

constexpr int ROWS = 64, DEPTH = 16, MOST_COLUMNS = 256;
constexpr uint32_t IN_FLIGHT = 0x7fdeadad;  // a NaN

// N / 2 accumulators, a multiple of 4, come before 7 other operands, or 9 where a is in four registers.
int accumulators(const Instruction& i) { return (int(i.args.size()) - 7) / 4 * 4; }
bool in_registers(const Instruction& i) { return i.args.size() % 4 == 1; }

// {accumulators}, a, b, scale-d, scale-a, scale-b, transpose a (not of registers), transpose b
Then multiply(Thread& t, const Instruction& i) {
  const int* a = &i.args[accumulators(i)];
  const int* b = a + (in_registers(i) ? 4 : 1);
  for (const int* k = b + 2; k != &i.args.back() + 1; ++k)
    if (t.get<int>(*k) != (k < b + 4)) fail("signs or transposes", i);
  const Product product{&i, in_registers(i) ? 0 : t.get<uint64_t>(*a), t.get<uint64_t>(*b), t.get<bool>(b[1])};
  if (!together(t, ALL)) return Then::WAITS;
  Warp& warp = *t.warp;
  for (Thread* lane : warp.threads)
    if ((!in_registers(i) && lane->get<uint64_t>(*a) != product.a) || lane->get<uint64_t>(*b) != product.b ||
        lane->get<bool>(b[1]) != product.accumulate)
      fail("lanes that disagree", i);
  for (int r = 0; r < accumulators(i); ++r) {
    auto [flying, fresh] = warp.flying.try_emplace(i.args[r]);
    if ((fresh || in_registers(i)) && !warp.fenced) fail("no wgmma.fence before", i);
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
    if (lane.lane == 0) lane.warp->commits.push_back(lane.warp->issued), lane.warp->fenced = false;
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
    if (commits.size() <= may_fly) return;
    const size_t last = commits[commits.size() - may_fly - 1];
    while (commits.size() > may_fly) commits.pop_front();
    if (last == lane.warp->issued) land(*lane.warp, i);
  });
}

// Element (row, k) of an operand that a descriptor tells of.
float element(Cta& cta, uint64_t descriptor, int row, int k, bool half) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t period = 256u >> (descriptor >> 62);  // 128, 64 or 32 bytes: the length of a row
  if (period == 256 || (descriptor >> 49 & 7)) throw std::runtime_error("wgmma: not swizzled");
  uint16_t bits;
  const uint32_t at = swizzled(start + row / 8 * eight_rows + row % 8 * period + 2 * k, period);
  __builtin_memcpy(&bits, fenced(cta, at, 2), 2);
  return to_float(bits, half);
}

}  // namespace

void Warpgroup::execute() {
  const Product& product = products[executed++];
  const bool half = product.at->text.find(".f32.f16.f16") != std::string::npos;
  const int columns = 2 * accumulators(*product.at);
  Cta& cta = *warps[0]->cta;
  double a[4][16][DEPTH], b[DEPTH][MOST_COLUMNS], sums[ROWS][MOST_COLUMNS] = {};
  for (const Warp* warp : warps)
    for (const Thread* lane : warp->threads) {
      if (!in_registers(*product.at)) break;
      uint32_t registers[4];
      for (int part = 0; part < 4; ++part)
        registers[part] = lane->get<uint32_t>(product.at->args[accumulators(*product.at) + part]);
      spread(lane->lane, registers, half, a[warp->index % 4]);
    }
  for (int k = 0; k < DEPTH; ++k) {
    for (int row = 0; !in_registers(*product.at) && row < ROWS; ++row)
      a[row / 16][row % 16][k] = element(cta, product.a, row, k, half);
    for (int col = 0; col < columns; ++col) b[k][col] = element(cta, product.b, col, k, half);
  }
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < DEPTH; ++k)
      for (int col = 0; col < columns; ++col) sums[row][col] += a[row / 16][row % 16][k] * b[k][col];
  for (int warp = 0; warp < 4; ++warp)
    for (int r = 0; r < accumulators(*product.at); ++r) {
      auto& values = warps[warp]->flying.at(product.at->args[r]);
      for (int lane = 0; lane < 32; ++lane) {
        const int row = 16 * warp + lane / 4 + r / 2 % 2 * 8, col = r / 4 * 8 + lane % 4 * 2 + r % 2;
        values[lane] = towards_zero(sums[row][col] + (product.accumulate ? values[lane] : 0.0f));
      }
    }
}

std::map<std::string, Handler> collective_operations() {
  const Handler nothing = [](Thread&, const Instruction&) { return Then::NEXT; };
  const std::string wgmma = "wgmma.mma_async.sync.aligned.m64", mma = "mma.sync.aligned.m16n8k16.row.col.f32.";
  return {
      {"shfl.sync.bfly.b32",
       [](Thread& t, const Instruction& i) {
         return shuffle(t, i, [](uint32_t lane, uint32_t b, uint32_t) { return lane ^ (b & 31); });
       }},
      {"shfl.sync.idx.b32",
       [](Thread& t, const Instruction& i) {
         return shuffle(t, i, [](uint32_t lane, uint32_t b, uint32_t s) { return (lane & s) | (b & ~s & 31); });
       }},
      {"vote.sync.any.pred", vote_any},
      {"elect.sync", elect},
      {"stmatrix.sync.aligned.x4.m8n8.shared.b16", store_matrices<4, false>},
      {"stmatrix.sync.aligned.m8n8.x4.shared.b16", store_matrices<4, false>},
      {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", store_matrices<4, true>},
      {"setmaxnreg.inc.sync.aligned.u32", set_registers<true>},
      {"setmaxnreg.dec.sync.aligned.u32", set_registers<false>},
      {"bar.sync", bar_sync},
      {"barrier.cluster.arrive.relaxed.aligned", cluster_arrive},
      {"barrier.cluster.wait.aligned", cluster_wait},
      {"fence.mbarrier_init.release.cluster", nothing},
      {"fence.proxy.async.shared", fence_for_copies},
      {"prefetch.tensormap", nothing},
      {"mapa.shared::cluster.u32",
       [](Thread& t, const Instruction& i) {
         t.set<uint32_t>(i.args[0], remote(t.get<int>(i.args[2]), t.get<uint32_t>(i.args[1])));
         return Then::NEXT;
       }},
      {"mbarrier.init.shared.b64", mbarrier_init},
      {"mbarrier.arrive.shared.b64",
       [](Thread& t, const Instruction& i) { return arrive(t, uint32_t(address(t, i, 1)), 0), Then::NEXT; }},
      {"mbarrier.arrive.shared::cluster.b64",
       [](Thread& t, const Instruction& i) { return arrive(t, uint32_t(address(t, i, 1)), 0), Then::NEXT; }},
      {"mbarrier.arrive.expect_tx.shared.b64",
       [](Thread& t, const Instruction& i) {
         return arrive(t, uint32_t(address(t, i, 1)), t.get<uint32_t>(i.args[3])), Then::NEXT;
       }},
      {"mbarrier.try_wait.parity.shared.b64", mbarrier_wait},
      {"cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint",
       copy_in<3, true>},
      {"cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint", copy_in<3, false>},
      {"cp.async.bulk.tensor.2d.global.shared.bulk_group", copy_out<2>},
      {"cp.async.bulk.commit_group", [](Thread& t, const Instruction&) { return t.stores.emplace_back(), Then::NEXT; }},
      {"cp.async.bulk.wait_group.read", copies_wait<&Thread::stores>},
      {"cp.async.bulk.tensor.2d.shared.global.mbarrier::complete_tx::bytes", copy_in<2, false>},
      {"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", copy_in<2, false>},
      {"cp.async.cg.shared.global", copy_some},
      {"cp.async.commit_group", [](Thread& t, const Instruction&) { return t.loads.emplace_back(), Then::NEXT; }},
      {"cp.async.wait_group", copies_wait<&Thread::loads>},
      {"ldmatrix.sync.aligned.m8n8.x1.shared.b16", load_matrices<1, false>},
      {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", load_matrices<2, false>},
      {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", load_matrices<4, false>},
      {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", load_matrices<2, true>},
      {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", load_matrices<4, true>},
      {"redux.sync.max.s32", extreme<int32_t, true>},
      {"redux.sync.min.s32", extreme<int32_t, false>},
      {"redux.sync.max.u32", extreme<uint32_t, true>},
      {"redux.sync.min.u32", extreme<uint32_t, false>},
      {"mbarrier.inval.shared.b64",
       [](Thread& t, const Instruction& i) { return t.cta->mbarriers.erase(uint32_t(address(t, i, 0))), Then::NEXT; }},
      {mma + "bf16.bf16.f32", multiply_16_8<false>},
      {mma + "f16.f16.f32", multiply_16_8<true>},
      {wgmma + "n64k16.f32.bf16.bf16", multiply},
      {wgmma + "n128k16.f32.bf16.bf16", multiply},
      {wgmma + "n64k16.f32.f16.f16", multiply},
      {wgmma + "n128k16.f32.f16.f16", multiply},
      {"wgmma.fence.sync.aligned", [](Thread& t, const Instruction&) { return t.warp->fenced = true, Then::NEXT; }},
      {"wgmma.commit_group.sync.aligned", commit},
      {"wgmma.wait_group.sync.aligned", products_wait},
  };
}

}  // namespace ptx
