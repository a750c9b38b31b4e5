// The statistics of one tile of S: top and total of its rows and columns, for every class of pairs.
//
// A warp holds 32 rows of the tile. It first takes one top for all of them and one 2^t for each logit, e = 2^(t - top),
// whose sums along the rows and along the columns are the totals. Any top is right that brings them into range, so
// that of the negatives is taken of a quarter of them. Where a total comes near the smallest or the largest
// numbers every line gets a top of its own instead. Rows are then finished; columns are merged over the 4 warps.
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
  struct Shared {
    LogitVectors logits;
    float row_center[K == 2 ? TILE : 1], col_center[K == 2 ? TILE : 1];
    float top[K][4][TILE], total[K][4][TILE], deviation[K == 2 ? 4 : 1][TILE];  // of the columns, by the warps
  };

  FLASHCL_LANE Sweep(const SweepArgs& args, Seat<W> seat, Shared& shared)
      : a_(args), seat_(seat), tile_(seat.tile), s_(shared) {
    // Line i of a triangular block meets tile t as a row where t is on its right, as a column (of the tile above) where
    // t is on its left: every place (t, i) of the array that they share is written once, the diagonal by its rows.
    cols_ = a_.col.sums && !(a_.block.triangular && tile_.n == tile_.m);
  }

  FLASHCL_LANE void load() {
    const I at = seat_.own();
    scale_ = *a_.block.logit_scale * float(LOG2E);
    stage<W>(s_.logits.rows, a_.block.row_bias, tile_.n, at, float(LOG2E));
    stage<W>(s_.logits.cols, a_.block.col_bias, tile_.m, at, float(LOG2E));
    if constexpr (K == 2) {
      stage<W>(s_.row_center, a_.row.center, tile_.n, at);
      stage<W>(s_.col_center, a_.col.center, tile_.m, at);
    }
    pairs_.load(a_.block, seat_);
  }

  template <class Acc>
  FLASHCL_LANE void visit(const Acc& acc) {
    FLASHCL_ROLLED
    for (int k = 0; k < K; ++k) {
      pairs_.members(members_, k);
      statistics(acc, k);
    }
    if (K == 2 && a_.row.deviation) deviations(acc);  // members_ are the positives now
  }

  // Merges the columns of the 4 warps.
  FLASHCL_LANE void finish() {
    if (!cols_) return;
    const I at = seat_.own();
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
        total += W::load_shared(s_.total[k][w], at) * W::exp2(W::load_shared(s_.top[k][w], at) - or_zero<W>(top));
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
  float scale_;
  U members_[4];  // the pairs of the class at hand

  template <class Acc>
  FLASHCL_LANE void statistics(const Acc& acc, int k) {
    if (K == 2 && !some_members()) return nothing(k);
    bool served;
    if (k == 1)
      served = shared_top<false, K - 1>(acc);
    else
      served = pairs_.plain && !a_.block.row_bias ? shared_top<K == 1, 0>(acc) : shared_top<false, 0>(acc);
    if (!served) own_tops(acc, k);
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

  // The logit of a pair of the class at hand less a shift, else -inf. acc keeps the products: there are not registers enough for
  // logits beside them, and the compiler does not see that they need not be beside them.
  template <bool PLAIN = false, class Acc>
  FLASHCL_LANE F member(const Logits<W>& logits, F shift, const Acc& acc, int r, int chunk, int q) const {
    const int i = Fragment::place(r, chunk, q);
    if (PLAIN) return logits.plain(acc[i], shift);
    return W::select(W::has(members_[i / 32], i % 32), logits.of(acc[i], shift, r, logits.seat.col(chunk, q)), F(-INF));
  }

  FLASHCL_LANE Logits<W> logits() const { return {scale_, s_.logits, seat_}; }

  // Begins another pass over the members.
  FLASHCL_LANE void next_pass(Logits<W>& logits) {
    for (U& bits : members_) bits = W::forgotten(bits);
    logits.forget();
  }

  // The largest logit of a quarter of the columns; of all of them where few pairs count.
  template <bool PLAIN, int k, class Acc>
  FLASHCL_LANE F some_top(const Logits<W>& logits, const Acc& acc) const {
    constexpr int LOOKED_AT = k == 0 ? 1 : Fragment::CHUNKS;
    F tops[4] = {F(-INF), F(-INF), F(-INF), F(-INF)};  // 4 chains: in one each maximum would wait for the last
    FLASHCL_UNROLL
    for (int i = 0; i < R * LOOKED_AT * C; ++i)
      tops[i % 4] = W::max(tops[i % 4], member<PLAIN>(logits, 0.0f, acc, i / (LOOKED_AT * C), i / C % LOOKED_AT, i % C));
    return W::warp_max(W::max(W::max(tops[0], tops[1]), W::max(tops[2], tops[3])));
  }

  // Statistics of class k with one top for the warp; says whether it served.
  template <bool PLAIN, int k, class Acc>
  FLASHCL_LANE bool shared_top(const Acc& acc) {
    Logits<W> all = logits();
    const F top = or_zero<W>(some_top<PLAIN, k>(all, acc));
    if constexpr (!PLAIN) next_pass(all);
    // Of the totals. A NaN is passed over: its line is NaN under any top.
    F row[R], least = F(1.0f), most = F(1.0f);
    for (F& sum : row) sum = F(0.0f);
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      F col[C];
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        col[q] = F(0.0f);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const F t = member<PLAIN>(all, top, acc, r, chunk, q), e = W::exp2(t);
          row[r] += e;
          col[q] += e;
          // Most lines have no positive at all: their total of 0 tells nothing, the smallest of the terms does.
          if (k == 1) least = W::min(least, W::select(t == F(-INF), F(1.0f), e));
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
      most = W::max(most, row[r]);  // with those of the rows those of the columns are in range, too
      store_row(k, r, top_of_some(k, top, row[r]), row[r]);
    }
    return !W::any(!(least > F(TINY)) | !(most < F(LARGE)));
  }

  // Lines without positives have no top.
  static FLASHCL_LANE F top_of_some(int k, F top, F total) {
    return W::select((total == F(0.0f)) & B(k == 1), F(-INF), top);
  }

  // Statistics of class k, every line with its own top: right for any logits. Columns one by one, to need few
  // registers.
  template <class Acc>
  FLASHCL_LANE void own_tops(const Acc& acc, int k) {
    Logits<W> all = logits();
    const int zero = a_.block.N >> 31;
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      next_pass(all);
      F top = F(-INF), total = F(0.0f);
      FLASHCL_UNROLL
      for (int i = 0; i < 4 * C; ++i) {
        if (i % C == 0) all.wait_for(top, zero);
        top = W::max(top, member(all, 0.0f, acc, r, i / C, i % C));
      }
      top = quad_max<W>(top);
      const F shift = or_zero<W>(top);
      next_pass(all);
      FLASHCL_UNROLL
      for (int i = 0; i < 4 * C; ++i) {
        if (i % C == 0) all.wait_for(total, zero);
        total += W::exp2(member(all, shift, acc, r, i / C, i % C));
      }
      store_row(k, r, top, quad_sum<W>(total));
    }
    if (!cols_) return;
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      next_pass(all);
      F own_top = F(0.0f), own_total = F(0.0f);
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        F top = F(-INF), total = F(0.0f);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) top = W::max(top, member(all, 0.0f, acc, r, chunk, q));
        FLASHCL_UNROLL
        for (int mask = 4; mask <= 16; mask *= 2) top = W::max(top, W::shuffle_xor(top, mask));
        const F shift = or_zero<W>(top);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) total += W::exp2(member(all, shift, acc, r, chunk, q));
        FLASHCL_UNROLL
        for (int mask = 4; mask <= 16; mask *= 2) total += W::shuffle_xor(total, mask);
        const B own = seat_.lane / 4 == I(q);  // as butterfly leaves them
        own_top = W::select(own, top, own_top);
        own_total = W::select(own, total, own_total);
        all.wait_for(own_total, zero);
      }
      store_col(k, chunk, own_top, own_total);
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
    Logits<W> all = logits();
    F row_center[R], row[R];
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      row_center[r] = W::load_shared(s_.row_center, seat_.row(r));
      row[r] = F(0.0f);
    }
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      next_pass(all);
      F col[C];
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        const F center = W::load_shared(s_.col_center, seat_.col(chunk, q));
        col[q] = F(0.0f);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const F t = member(all, 0.0f, acc, r, chunk, q);
          const B counts = t != F(-INF);
          row[r] += W::select(counts, W::fma(t, F(float(LN2)), -row_center[r]), F(0.0f));
          col[q] += W::select(counts, W::fma(t, F(float(LN2)), -center), F(0.0f));
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
