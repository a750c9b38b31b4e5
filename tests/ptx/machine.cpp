// How a kernel comes to run: threads with their registers, turns, copies in the background.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace ptx {

char* Cta::at(uint32_t address, size_t bytes) {
  if (address < SHARED_BASE || address + bytes > SHARED_BASE + this->bytes)
    throw std::runtime_error("shared memory has no address " + std::to_string(address));
  return memory.get() + (address - SHARED_BASE);
}

void Cluster::finish_copy(int number) {
  for (size_t i = 0; i < copies.size(); ++i)
    if (copies[i].number == number) {
      const auto run = std::move(copies[i].run);
      copies.erase(copies.begin() + i);
      run();
      ++progress;
      return;
    }
}

namespace {

int count(Dim d) { return d.x * d.y * d.z; }

Dim at(int i, Dim size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

// What a special register of a thread holds.
uint32_t special(const std::string& name, const Thread& t) {
  const Cluster& c = *t.cta->cluster;
  const auto of = [&](const char* family, Dim d) {
    return name == std::string(family) + ".x"   ? d.x
           : name == std::string(family) + ".y" ? d.y
           : name == std::string(family) + ".z" ? d.z
                                                : -1;
  };
  for (const int value : {of("%tid", at(t.tid, c.threads)), of("%ntid", c.threads), of("%ctaid", t.cta->index),
                          of("%nctaid", c.grid), of("%cluster_ctaid", at(t.cta->rank, c.cluster))})
    if (value >= 0) return value;
  if (name == "%laneid") return t.lane;
  if (name == "%cluster_ctarank") return t.cta->rank;
  if (name == "_") return 0;
  throw std::runtime_error("ptx: unknown register " + name);
}

void populate(Cluster& c, Dim first, size_t dynamic_shared) {
  const size_t bytes = c.program->static_shared + dynamic_shared;
  for (int rank = 0; rank < count(c.cluster); ++rank) {
    const Dim in = at(rank, c.cluster);
    auto cta = std::make_unique<Cta>();
    cta->cluster = &c, cta->rank = rank, cta->index = {first.x + in.x, first.y + in.y, first.z + in.z};
    cta->bytes = bytes;
    cta->memory.reset(static_cast<char*>(std::aligned_alloc(1024, (bytes / 1024 + 1) * 1024)));
    std::memset(cta->memory.get(), 0xff, bytes);  // NaN: what nobody wrote is seen
    cta->unfenced.assign(bytes, 0);
    cta->running = count(c.threads);
    for (int tid = 0; tid < count(c.threads); ++tid) {
      if (tid % 32 == 0) {
        auto warp = std::make_unique<Warp>();
        if (tid % 128 == 0) c.warpgroups.push_back(std::make_unique<Warpgroup>());
        warp->cta = cta.get(), warp->index = tid / 32, warp->group = c.warpgroups.back().get();
        warp->group->warps.push_back(warp.get());
        c.warps.push_back(std::move(warp));
      }
      Thread& t = c.all.emplace_back();
      t.registers.reset(static_cast<uint64_t*>(std::calloc(c.program->registers, sizeof(uint64_t))));
      t.constants = c.program->constants.data();
      t.warp = c.warps.back().get(), t.cta = cta.get(), t.tid = tid, t.lane = tid % 32;
      t.held_registers = 65536 / count(c.threads) / 8 * 8;
      t.warp->threads.push_back(&t);
      for (const auto& [name, place] : c.program->specials) t.set<uint32_t>(place, special(name, t));
    }
    c.running += count(c.threads);
    c.ctas.push_back(std::move(cta));
  }
}

void leave(Thread& t) {
  t.done = true;
  Cluster& c = *t.cta->cluster;
  --c.running, --t.cta->running, ++c.progress;
  if (t.cluster_phase > c.phase) --c.arrived;
  if (c.running > 0 && c.arrived == c.running) c.arrived = 0, ++c.phase;
  for (const auto& group : t.stores)
    for (int number : group)
      for (const Copy& copy : c.copies)
        if (copy.number == number)
          throw std::runtime_error("a thread left while the copy engine reads its shared memory");
}

// Until it waits, or its time is over.
void run(Thread& t, int steps) {
  const Program& p = *t.cta->cluster->program;
  while (steps-- > 0 && !t.waits && !t.done) {
    const Instruction& i = p.code[t.pc];
    if (i.guard >= 0 && t.get<bool>(i.guard) == i.negated) {
      ++t.pc;
      continue;
    }
    switch (i.run(t, i)) {
      case Then::NEXT:
        ++t.pc;
        break;
      case Then::YIELDS:
        ++t.pc;
        return;
      case Then::JUMPED:
        break;
      case Then::WAITS:
        return;
      case Then::EXITS:
        leave(t);
        return;
    }
  }
}

std::string where(const Cluster& c) {
  std::map<std::string, int> places;
  for (const Thread& t : c.all)
    if (!t.done)
      ++places["CTA " + std::to_string(t.cta->rank) + " warp " + std::to_string(t.warp->index) + ": " +
               c.program->code[t.pc].text];
  std::string out;
  for (const auto& [place, threads] : places) out += "\n  " + std::to_string(threads) + " threads of " + place;
  return out;
}

// Copies and products that are under way: each may happen now, or later.
void background(Cluster& c, double often) {
  std::vector<int> now;
  for (const Copy& copy : c.copies)
    if (c.chance(often)) now.push_back(copy.number);
  std::shuffle(now.begin(), now.end(), c.random);
  for (int number : now) c.finish_copy(number);
  for (auto& group : c.warpgroups)
    while (group->can_execute() && c.chance(often)) group->execute();
}

void run(Cluster& c) {
  std::vector<int> order(c.warps.size());
  std::iota(order.begin(), order.end(), 0);
  // A cluster has a temper: copies that come at once or late, warps that run far ahead or in lockstep.
  const double often = std::array{1.0, 0.3, 0.02}[c.random() % 3];
  const int longest = std::array{100000, 2000, 60}[c.random() % 3];
  uint64_t last = 0;
  for (int idle = 0; c.running > 0;) {
    std::shuffle(order.begin(), order.end(), c.random);
    for (int w : order) {
      const auto& lanes = c.warps[w]->threads;
      for (size_t k = 0, first = c.random(); k < lanes.size(); ++k) {
        Thread& t = *lanes[(k * 5 + first) % lanes.size()];  // 5: for neighbours not to come one after the other
        if (!t.waits && !t.done) run(t, 1 + c.random() % longest);
      }
    }
    background(c, often);
    idle = c.progress == last ? idle + 1 : 0;
    last = c.progress;
    if (idle > 2000 && c.copies.empty()) throw std::runtime_error("nothing moves any more:" + where(c));
  }
  for (const auto& copies = c.copies; !copies.empty();) c.finish_copy(copies.front().number);
}

}  // namespace

void launch(const Program& program, Dim grid, Dim cluster, Dim threads, size_t dynamic_shared, unsigned seed) {
  if (program.max_threads && count(threads) > program.max_threads) throw std::runtime_error("too many threads");
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    throw std::runtime_error("clusters do not fill the grid");
  if (program.static_shared + dynamic_shared > 227 * 1024) throw std::runtime_error("too much shared memory");
  if (program.static_shared && dynamic_shared) throw std::runtime_error("static and dynamic shared memory");
  std::mt19937 random(seed);
  std::vector<Dim> first;  // CTAs of the clusters
  for (int z = 0; z < grid.z; z += cluster.z)
    for (int y = 0; y < grid.y; y += cluster.y)
      for (int x = 0; x < grid.x; x += cluster.x) first.push_back({x, y, z});
  std::shuffle(first.begin(), first.end(), random);
  for (Dim each : first) {
    Cluster c;
    c.program = &program, c.grid = grid, c.cluster = cluster, c.threads = threads;
    c.random.seed(random());
    populate(c, each, dynamic_shared);
    run(c);
  }
}

}  // namespace ptx
