// The kernels on the CPU, for the tests: products by a plain loop, everything else by the code that the GPU runs
// (lanes.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

namespace flashcl {
namespace {

float element(const void* p, int64_t i, bool half) {
  return half ? to_float(static_cast<const __half*>(p)[i]) : to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

void set_element(void* p, int64_t i, float value, bool half) {
  half ? round_to(static_cast<__half*>(p)[i], value) : round_to(static_cast<__nv_bfloat16*>(p)[i], value);
}

// Row `row` of x in float32, zeros past the end: what TMA does there.
std::vector<float> row_of(const void* x, int64_t stride, int row, int size, int D, bool half) {
  std::vector<float> out(D, 0.0f);
  if (row < size)
    for (int k = 0; k < D; ++k) out[k] = element(x, row * stride + k, half);
  return out;
}

// A product as tensor cores sum it: 16 terms at a time, exactly, and what a float cannot hold is cut off, not rounded.
float product(const std::vector<float>& u, const std::vector<float>& v) {
  float sum = 0.0f;
  for (size_t k = 0; k < u.size(); k += 16) {
    double wide = sum;
    for (size_t i = k; i < std::min(k + 16, u.size()); ++i) wide += double(u[i]) * v[i];
    sum = float(wide);
    if (std::fabs(double(sum)) > std::fabs(wide) && std::isfinite(sum)) sum = std::nextafter(sum, 0.0f);
  }
  return sum;
}

struct Fragments {
  Warp::F of_warp[4][Fragment::PLACES];
};

void products(const Block& b, Place tile, Fragments& out) {
  std::vector<std::vector<float>> x, y;
  for (int i = 0; i < TILE; ++i) {
    x.push_back(row_of(b.x, b.x_stride, tile.n * TILE + i, b.N, b.D, b.half));
    y.push_back(row_of(b.y, b.y_stride, tile.m * TILE + i, b.M, b.D, b.half));
  }
  for (int warp = 0; warp < 4; ++warp)
    for (int r = 0; r < Fragment::ROWS; ++r)
      for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk)
        for (int q = 0; q < Fragment::COLS; ++q)
          for (int lane = 0; lane < 32; ++lane)
            out.of_warp[warp][Fragment::place(r, chunk, q)].v[lane] =
                product(x[Fragment::row(warp, lane, r)], y[Fragment::col(lane, chunk, q)]);
}

void store(const Output& out, const Block& b, Place tile, const Fragments& acc) {
  for (int warp = 0; warp < 4; ++warp)
    for (int r = 0; r < Fragment::ROWS; ++r)
      for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk)
        for (int q = 0; q < Fragment::COLS; ++q)
          for (int lane = 0; lane < 32; ++lane) {
            const int64_t i = tile.n * TILE + Fragment::row(warp, lane, r),
                          j = tile.m * TILE + Fragment::col(lane, chunk, q);
            set_element(out.g, i * out.stride + j, acc.of_warp[warp][Fragment::place(r, chunk, q)].v[lane], b.half);
          }
}

const Output* output_of(const SweepArgs&) { return nullptr; }
template <class Args>
const Output* output_of(const Args& args) {
  return args.out.g ? &args.out : nullptr;
}

// What TilesKernel does, one tile after the other.
template <class Epilogue, class Args>
void run(const Args& args) {
  const Schedule schedule = args.block.schedule();
  const auto acc = std::make_unique<Fragments>();
  for (int unit = 0; unit < schedule.units(); ++unit)
    for (int rank = 0; rank < CLUSTER; ++rank) {
      const Place tile = schedule.at(unit, rank);
      if (!schedule.wanted(tile)) continue;
      const auto shared = std::make_unique<typename Epilogue::Shared>();
      std::memset(shared.get(), 0xff, sizeof(*shared));  // NaN: what no lane writes is seen
      std::vector<Epilogue> warps;
      for (int warp = 0; warp < 4; ++warp) warps.emplace_back(args, Seat<Warp>{tile, warp}, *shared);
      for (Epilogue& warp : warps) warp.load();
      products(args.block, tile, *acc);
      for (int warp = 0; warp < 4; ++warp) warps[warp].visit(acc->of_warp[warp]);
      if (const Output* out = output_of(args)) store(*out, args.block, tile, *acc);
      for (Epilogue& warp : warps) warp.finish();
    }
}

}  // namespace

void emulate_sweep(const SweepArgs& args) {
  args.block.row_label ? run<Sweep<Warp, ByLabel>>(args) : run<Sweep<Warp, Different>>(args);
}

void emulate_grad(const GradArgs& args) {
  args.block.row_label ? run<Grad<Warp, ByLabel>>(args) : run<Grad<Warp, Different>>(args);
}

void emulate_sigmoid(const SigmoidArgs& args) { run<Sigmoid<Warp, Different>>(args); }

void emulate_fold(const FoldArgs& args) {
  for (int k = 0; k < args.K; ++k)
    for (int i = 0; i < args.n; ++i) {
      Statistic parts[FOLDERS];
      for (int folder = 0; folder < FOLDERS; ++folder) parts[folder] = fold_part(args, k, i, folder);
      fold_parts(args, k, i, parts);
    }
}

void emulate_partner_products(const PartnerArgs& args) {
  for (int64_t i = 0; i < args.N; ++i) {
    double sum[32];
    for (int lane = 0; lane < 32; ++lane) sum[lane] = partner_part(args, i, lane);
    for (int mask = 16; mask > 0; mask /= 2)
      for (int lane = 0; lane < mask; ++lane) sum[lane] += sum[lane + mask];
    args.out[i] = sum[0];
  }
}

void emulate_finish(const FinishArgs& args) {
  for (int64_t i = 0; i < args.R; ++i)
    for (int lane = 0; lane < 32; ++lane) finish_part(args, i, lane);
}

}  // namespace flashcl
