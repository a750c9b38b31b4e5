// The statistics of one tile of S: top and total of its rows and columns, for every class of pairs.
//
// A warp holds 32 rows of the tile. It first takes one top for all of them and one exp per logit, e = exp(s - top),
// whose sums along the rows and along the columns are the totals. Where a total comes near the smallest numbers (or is
// not finite) every line gets a top of its own instead. Rows are then finished; columns are merged over the 4 warps.
#pragma once

#include "logits.h"
#include "numerics.h"
#include "reduce.h"

namespace flashcl {

struct SweepArgs {
  Block block;
  Lines row, col;  // of a triangular block both are the same; col.sums is null where columns are not wanted
};

template <class W, class Program>
class Sweep {
  using F = typename W::F;
  using I = typename W::I;
  using U = typename W::U;
  using B = typename W::B;
  static constexpr int K = Program::CLASSES, R = Fragment::ROWS, C = Fragment::COLS;

 public:
  struct Shared {  // of the columns
    float bias[TILE], center[K == 2 ? TILE : 1];
    float top[K][4][TILE], total[K][4][TILE], deviation[K == 2 ? 4 : 1][TILE];  // by the warps
  };

  FLASHCL_LANE Sweep(const SweepArgs& args, Seat<W> seat, Shared& shared)
      : a_(args), seat_(seat), tile_(seat.tile), s_(shared) {
    // Line i of a triangular block meets tile t as a row where t is on its right, as a column (of the tile above) where
    // t is on its left: every place (t, i) of the array that they share is written once, the diagonal by its rows.
    cols_ = a_.col.sums && !(a_.block.triangular && tile_.n == tile_.m);
  }

  FLASHCL_LANE void load() {
    pairs_.load(a_.block, seat_);
    stage<W>(s_.bias, a_.block.col_bias, tile_.m, seat_.own_col());
    if constexpr (K == 2) stage<W>(s_.center, a_.col.center, tile_.m, seat_.own_col());
  }

  template <class Acc>
  FLASHCL_LANE void visit(Acc& acc) {
    row_bias_ = RowBias<W>(a_.block, seat_);
    if constexpr (K == 1) {
      pairs_.masked ? to_logits<true>(acc) : to_logits<false>(acc);
      statistics(acc, 0);
    } else {
      FLASHCL_ROLLED
      for (int k = 0; k < K; ++k) {
        pairs_.members(members_, k);
        statistics(acc, k);
      }
      if (a_.row.deviation) deviations(acc);  // members_ are the positives now
    }
  }

  // Merges the columns of the 4 warps.
  FLASHCL_LANE void finish() {
    if (!cols_) return;
    const I at = seat_.own_col();
    const Schedule t = a_.block.schedule();
    const int64_t plane = int64_t(t.tiles_n) * t.tiles_m * TILE, line = (int64_t(tile_.n) * t.tiles_m + tile_.m) * TILE;
    FLASHCL_UNROLL
    for (int k = 0; k < K; ++k) {
      F top = W::load_shared(s_.top[k][0], at);
      FLASHCL_UNROLL
      for (int w = 1; w < 4; ++w) top = W::max(top, W::load_shared(s_.top[k][w], at));
      F total = F(0.0f);
      FLASHCL_UNROLL
      for (int w = 0; w < 4; ++w)
        total += W::load_shared(s_.total[k][w], at) * W::exp(W::load_shared(s_.top[k][w], at) - or_zero<W>(top));
      store_sums(a_.col.sums + 2 * k * plane + line, plane, at, top, total, B(true));
    }
    if (K == 2 && a_.col.deviation) {
      F sum = W::load_shared(s_.deviation[0], at);
      for (int w = 1; w < 4; ++w) sum += W::load_shared(s_.deviation[w], at);
      W::store(a_.col.deviation + line, at, sum, B(true));
    }
  }

 private:
  const SweepArgs& a_;
  Seat<W> seat_;
  Place tile_;
  Shared& s_;
  bool cols_;
  Pairs<W, Program> pairs_;
  RowBias<W> row_bias_;
  U members_[4];  // the pairs of the class at hand; only with two classes

  template <class Acc>
  FLASHCL_LANE void statistics(const Acc& acc, int k) {
    if (K == 2 && !some_members())
      nothing(k);
    else if (!shared_top(acc, k))
      own_tops(acc, k);
  }

  // Of two classes. With few rows to a label most warps have no positive.
  FLASHCL_LANE bool some_members() const {
    return W::any((members_[0] | members_[1] | members_[2] | members_[3]) != U(0));
  }

  FLASHCL_LANE void nothing(int k) {
    for (int r = 0; r < R; ++r) store_row(k, r, F(-INF), F(0.0f));
    if (!cols_) return;
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) store_col(k, chunk, F(-INF), F(0.0f));
  }

  // acc: products -> logits, and where MASKED to -inf where a pair does not count.
  template <bool MASKED, class Acc>
  FLASHCL_LANE void to_logits(Acc& acc) {
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const int i = Fragment::place(r, chunk, q);
          const F s = logit_at(acc, r, chunk, q);
          acc[i] = W::settled(MASKED ? W::select(pairs_.dropped(i), F(-INF), s) : s);
        }
      }
    }
  }

  // Of the product in acc.
  template <class Acc>
  FLASHCL_LANE F logit_at(const Acc& acc, int r, int chunk, int q) const {
    const F bias = W::load_shared(s_.bias, seat_.col(chunk, q));
    return logit<W>(acc[Fragment::place(r, chunk, q)], *a_.block.logit_scale, row_bias_.at[r], bias);
  }

  // The logit of a pair of the class at hand, else -inf. With two classes acc keeps the products: there are not
  // registers enough for logits beside them, and the compiler does not see that they need not be beside them.
  template <class Acc>
  FLASHCL_LANE F member(const Acc& acc, int r, int chunk, int q) const {
    const int i = Fragment::place(r, chunk, q);
    if constexpr (K == 1) return acc[i];
    return W::select(W::has(members_[i / 32], i % 32), logit_at(acc, r, chunk, q), F(-INF));
  }

  // Begins another pass over the members: nothing of the last one is worth keeping.
  FLASHCL_LANE void next_pass() {
    if constexpr (K == 2) {
      for (U& bits : members_) bits = W::forgotten(bits);
      for (F& bias : row_bias_.at) bias = W::forgotten(bias);
    }
  }

  // Statistics of class k with one top for the warp; says whether it served.
  template <class Acc>
  FLASHCL_LANE bool shared_top(const Acc& acc, int k) {
    F tops[4] = {F(-INF), F(-INF), F(-INF), F(-INF)};  // 4 chains: in one each maximum would wait for the last
    FLASHCL_UNROLL
    for (int i = 0; i < Fragment::PLACES; ++i) tops[i % 4] = W::max(tops[i % 4], member(acc, i / 32, i / C % 4, i % C));
    const F top = warp_max<W>(W::max(W::max(tops[0], tops[1]), W::max(tops[2], tops[3])));
    const F shift = or_zero<W>(top);

    F row[R], least = F(1.0f);  // no term is larger. A NaN is passed over: its line is NaN under any top
    for (F& sum : row) sum = F(0.0f);
    next_pass();
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      F col[C];
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        col[q] = F(0.0f);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const F s = member(acc, r, chunk, q), e = W::exp(s - shift);
          row[r] += e;
          col[q] += e;
          // Most lines have no positive at all: their total of 0 tells nothing, the smallest of the terms does.
          if (K == 2 && k == 1) least = W::min(least, W::select(s == F(-INF), F(1.0f), e));
        }
      }
      const F total = butterfly<W, Add>(col, seat_.lane);
      if (k == 0 && cols_) least = W::min(least, total);
      if (cols_) store_col(k, chunk, top_of_some(k, top, total), total);
    }
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      row[r] = quad_sum<W>(row[r]);
      if (k == 0) least = W::min(least, row[r]);
      store_row(k, r, top_of_some(k, top, row[r]), row[r]);
    }
    return !W::any(!(least > F(TINY)) | !(top < F(INF)));
  }

  // Lines without positives have no top.
  static FLASHCL_LANE F top_of_some(int k, F top, F total) {
    return W::select((total == F(0.0f)) & B(k == 1), F(-INF), top);
  }

  // Statistics of class k, every line with its own top: right for any logits. Columns one by one, to need few
  // registers.
  template <class Acc>
  FLASHCL_LANE void own_tops(const Acc& acc, int k) {
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      next_pass();
      F top = F(-INF), total = F(0.0f);
      FLASHCL_UNROLL
      for (int i = 0; i < 4 * C; ++i) top = W::max(top, member(acc, r, i / C, i % C));
      top = quad_max<W>(top);
      const F shift = or_zero<W>(top);
      next_pass();
      FLASHCL_UNROLL
      for (int i = 0; i < 4 * C; ++i) total += W::exp(member(acc, r, i / C, i % C) - shift);
      store_row(k, r, top, quad_sum<W>(total));
    }
    if (!cols_) return;
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      next_pass();
      F top[C], total[C];
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        top[q] = F(-INF);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) top[q] = W::max(top[q], member(acc, r, chunk, q));
        // Not butterfly: every lane needs the top of every column that it meets.
        FLASHCL_UNROLL
        for (int mask = 4; mask <= 16; mask *= 2) top[q] = W::max(top[q], W::shuffle_xor(top[q], mask));
        total[q] = F(0.0f);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) total[q] += W::exp(member(acc, r, chunk, q) - or_zero<W>(top[q]));
      }
      const F sum = butterfly<W, Add>(total, seat_.lane), highest = butterfly<W, Max>(top, seat_.lane);
      store_col(k, chunk, highest, sum);
    }
  }

  // Sums of s - center over the positives, along rows and columns.
  template <class Acc>
  FLASHCL_LANE void deviations(const Acc& acc) {
    if (!some_members()) {
      for (int r = 0; r < R; ++r) store_row_deviation(r, F(0.0f));
      for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) store_col_deviation(chunk, F(0.0f));
      return;
    }
    F row_center[R], row[R];
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      row_center[r] = W::load(a_.row.center + int64_t(tile_.n) * TILE, seat_.row(r));
      row[r] = F(0.0f);
    }
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      next_pass();
      F col[C];
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        const F center = W::load_shared(s_.center, seat_.col(chunk, q));
        col[q] = F(0.0f);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const F s = member(acc, r, chunk, q);
          const B counts = s != F(-INF);
          row[r] += W::select(counts, s - row_center[r], F(0.0f));
          col[q] += W::select(counts, s - center, F(0.0f));
        }
      }
      store_col_deviation(chunk, butterfly<W, Add>(col, seat_.lane));
    }
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) store_row_deviation(r, quad_sum<W>(row[r]));
  }

  FLASHCL_LANE void store_row_deviation(int r, F sum) {
    const int64_t line = (int64_t(tile_.m) * a_.block.schedule().tiles_n + tile_.n) * TILE;
    W::store(a_.row.deviation + line, seat_.row(r), sum, seat_.writes_row());
  }

  FLASHCL_LANE void store_col_deviation(int chunk, F sum) {
    if (cols_) W::store(s_.deviation[seat_.warp], butterfly_col<W>(chunk, seat_.lane), sum, B(true));
  }

  FLASHCL_LANE void store_row(int k, int r, F top, F total) {
    const Schedule t = a_.block.schedule();
    const int64_t plane = int64_t(t.tiles_n) * t.tiles_m * TILE, line = (int64_t(tile_.m) * t.tiles_n + tile_.n) * TILE;
    store_sums(a_.row.sums + 2 * k * plane + line, plane, seat_.row(r), top, total, seat_.writes_row());
  }

  FLASHCL_LANE void store_col(int k, int chunk, F top, F total) {
    const I at = butterfly_col<W>(chunk, seat_.lane);
    W::store(s_.top[k][seat_.warp], at, top, B(true));
    W::store(s_.total[k][seat_.warp], at, total, B(true));
  }

  static FLASHCL_LANE void store_sums(float* sums, int64_t plane, I at, F top, F total, B mask) {
    W::store(sums, at, top, mask);
    W::store(sums + plane, at, total, mask);
  }
};

}  // namespace flashcl
