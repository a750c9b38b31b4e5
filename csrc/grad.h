// G of one tile of S, from the log-sum-exps of its rows and columns:
//
//     G_ij = row_weight[k, i] exp(s_ij - row_lse[k, i]) + col_weight[k, j] exp(s_ij - col_lse[k, j])
//            - (row_offset[i] + col_offset[j] where k = 1)
//
// Where the log-sum-exps of the tile are close to each other, one shift `low` serves all of them and one exp does:
//
//     G_ij = exp(s_ij - low) (a_i + b_j),   a_i = row_weight[i] exp(low - row_lse[i]),  b_j alike
//
// so it does where no gradient comes through the columns: low is row_lse[i] then, and b_j = 0. (Not with two classes:
// there a low for each row and class finds no registers, and no loss asks for it.)
#pragma once

#include "logits.h"
#include "numerics.h"
#include "reduce.h"
#include "sums.h"

namespace flashcl {

struct GradArgs {
  Block block;
  Side row, col;
  Sums sums;
  Output out;
};

// weight and lse of a line for one class. Without pairs lse becomes +inf: 0 times exp(s + inf) would not be 0.
template <class W>
struct Coefficient {
  typename W::F weight, lse;

  FLASHCL_LANE Coefficient(const Side& side, int k, int tile, typename W::I at) {
    using F = typename W::F;
    const int64_t line = k * side.stride + int64_t(tile) * TILE;
    weight = W::load(side.weight + line, at);
    lse = W::load(side.lse + line, at);
    const typename W::B empty = lse == F(-INF);
    weight = W::select(empty, F(0.0f), weight);
    lse = W::select(empty, F(INF), lse);
  }
};

template <class W, class Program>
class Grad {
  using F = typename W::F;
  using I = typename W::I;
  using B = typename W::B;
  static constexpr int K = Program::CLASSES, R = Fragment::ROWS, C = Fragment::COLS;

 public:
  struct Shared {
    // Of the columns: b_j where the exp is shared, weight and lse where it is not.
    float bias[TILE], offset[K == 2 ? TILE : 1], weight[K][TILE], lse[K][TILE];
    // Of the rows: read anew for every chunk of columns, which leaves 4 registers more while columns are summed.
    float row_offset[K == 2 ? TILE : 1];
    typename TileSums<W>::Shared sums;
  };

  FLASHCL_LANE Grad(const GradArgs& args, Seat<W> seat, Shared& shared)
      : a_(args), seat_(seat), tile_(seat.tile), s_(shared), two_sided_(args.col.weight) {}

  // Masks, and coefficients of the columns.
  FLASHCL_LANE void load() {
    const I at = seat_.own_col();
    pairs_.load(a_.block, seat_);
    shared_ = two_sided_ ? lie_together() : K == 1;
    stage<W>(s_.bias, a_.block.col_bias, tile_.m, at);
    if constexpr (K == 2) {
      stage<W>(s_.offset, a_.col.offset, tile_.m, at);
      stage<W>(s_.row_offset, a_.row.offset, tile_.n, at);
    }
    FLASHCL_UNROLL
    for (int k = 0; k < K; ++k) {
      F weight = F(0.0f), lse = F(INF);
      if (two_sided_) {
        const Coefficient<W> col(a_.col, k, tile_.m, at);
        weight = shared_ ? col.weight * W::exp(low_ - col.lse) : col.weight;
        lse = col.lse;
      }
      W::store(s_.weight[k], at, weight, B(true));
      W::store(s_.lse[k], at, lse, B(true));
    }
  }

  template <class Acc>
  FLASHCL_LANE void visit(Acc& acc) {
    if (K == 2 || pairs_.masked)
      shared_ ? visit_<true, true>(acc) : visit_<true, false>(acc);
    else if constexpr (K == 1)
      shared_ ? visit_<false, true>(acc) : visit_<false, false>(acc);
  }

  FLASHCL_LANE void finish() { TileSums<W>(a_.sums, a_.block, seat_, s_.sums).finish(); }

 private:
  const GradArgs& a_;
  Seat<W> seat_;
  Place tile_;
  Shared& s_;
  bool two_sided_;
  bool shared_;   // one exp for the rows and columns of the tile
  F low_;         // its shift, where there are both: the smallest log-sum-exp
  Pairs<W, Program> pairs_;

  // Finds low_, and whether all log-sum-exps lie close above it. Each warp does it for the whole tile: 4 rows and 4
  // columns a lane. Lines without pairs do not matter, those past the edges hold anything; +inf is not close.
  FLASHCL_LANE bool lie_together() {
    F high = F(-INF);
    low_ = F(INF);
    FLASHCL_UNROLL
    for (int k = 0; k < K; ++k) {
      FLASHCL_UNROLL
      for (int i = 0; i < TILE; i += 32) {
        const I at = seat_.lane + I(i);
        meet(a_.row, k, tile_.n, at, a_.block.N, high);
        meet(a_.col, k, tile_.m, at, a_.block.M, high);
      }
    }
    high = warp_max<W>(high);
    low_ = F(0.0f) - warp_max<W>(F(0.0f) - low_);
    const bool close = !W::any(!(high - low_ < F(SPREAD)));
    low_ = or_zero<W>(low_);  // of lines without pairs any will do
    return close;
  }

  FLASHCL_LANE void meet(const Side& side, int k, int tile, I at, int lines, F& high) {
    const F lse = W::load(side.lse + k * side.stride + int64_t(tile) * TILE, at);
    const B counts = (at < I(lines - tile * TILE)) & (lse != F(-INF));
    high = W::max(high, W::select(counts, lse, F(-INF)));
    low_ = W::min(low_, W::select(counts, lse, F(INF)));
  }

  // Coefficients of the rows that a lane meets.
  struct RowSide {
    F weight[K][R], shift[K][R];  // a_i and low where the exp is shared, weight and lse where it is not
  };

  template <bool SHARED>
  FLASHCL_LANE RowSide row_side() const {
    RowSide out;
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      FLASHCL_UNROLL
      for (int k = 0; k < K; ++k) {
        const Coefficient<W> row(a_.row, k, tile_.n, seat_.row(r));
        const bool moved = SHARED && two_sided_;
        out.weight[k][r] = moved ? row.weight * W::exp(low_ - row.lse) : row.weight;
        out.shift[k][r] = moved ? low_ : row.lse;
      }
    }
    return out;
  }

  template <bool MASKED, bool SHARED, class Acc>
  FLASHCL_LANE void visit_(Acc& acc) {
    const RowSide row = row_side<SHARED>();
    const RowBias<W> row_bias(a_.block, seat_);
    const float scale = *a_.block.logit_scale;
    TileSums<W> sums(a_.sums, a_.block, seat_, s_.sums);
    const F about = F(sums.about());
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      F row_offset[R];
      FLASHCL_UNROLL
      for (int r = 0; r < R; ++r) row_offset[r] = K == 2 ? W::load_shared(s_.row_offset, seat_.row(r)) : F(0.0f);
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        const I at = seat_.col(chunk, q);
        const F bias = W::load_shared(s_.bias, at);
        const F offset = K == 2 ? W::load_shared(s_.offset, at) : F(0.0f);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const int i = Fragment::place(r, chunk, q);
          const F product = acc[i];
          F s = logit<W>(product, scale, row_bias.at[r], bias);
          if (MASKED) s = W::select(pairs_.dropped(i), F(-INF), s);
          const B positive = pairs_.positive(i);
          F g = weighted_exp<SHARED>(s, positive, row, r, at);
          if (K == 2) g = g - W::select(positive, row_offset[r] + offset, F(0.0f));
          if (MASKED) g = W::select(pairs_.dropped(i), F(0.0f), g);  // again: 0 times the NaN of a line is not 0
          sums.scaled = W::fma(g, product - about, sums.scaled);
          acc[i] = W::settled(g);
        }
      }
      sums.add(acc, chunk);
    }
    sums.store();
  }

  template <bool SHARED>
  FLASHCL_LANE F weighted_exp(F s, B positive, const RowSide& row, int r, I at) const {
    F row_weight = row.weight[0][r], shift = row.shift[0][r], weight = W::load_shared(s_.weight[0], at), lse;
    if (!SHARED) lse = W::load_shared(s_.lse[0], at);
    if constexpr (K == 2) {
      row_weight = W::select(positive, row.weight[1][r], row_weight);
      shift = W::select(positive, row.shift[1][r], shift);
      weight = W::select(positive, W::load_shared(s_.weight[1], at), weight);
      if (!SHARED) lse = W::select(positive, W::load_shared(s_.lse[1], at), lse);
    }
    if (SHARED) return W::exp(s - (K == 2 ? low_ : shift)) * (row_weight + weight);
    return W::fma(row_weight, W::exp(s - shift), weight * W::exp(s - lse));
  }
};

}  // namespace flashcl
