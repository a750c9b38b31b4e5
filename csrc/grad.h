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
// there a low for each row and class finds no registers, and no loss asks for it.) Below, logits and log-sum-exps are
// in bits.
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

// weight and lse of a line for one class. Without pairs lse becomes +inf: 0 times exp(s + inf) would not be 0. So it is
// of the columns where no gradient comes through them.
//
// What rounding loses of lse in bits goes into the weight: 2^-lost is 1 - lost ln 2.
template <class W>
struct Coefficient {
  typename W::F weight, lse;

  FLASHCL_LANE Coefficient(const Side& side, int k, int tile, typename W::I at) {
    using F = typename W::F;
    weight = F(0.0f);
    lse = F(INF);
    if (!side.weight) return;
    const int64_t line = k * side.stride + int64_t(tile) * TILE;
    weight = W::load(side.weight + line, at);
    const F nats = W::load(side.lse + line, at);
    lse = nats * F(float(LOG2E));
    const F lost = W::fma(nats, F(float(LOG2E)), F(0.0f) - lse) + nats * F(float(LOG2E - float(LOG2E)));
    const typename W::B empty = nats == F(-INF);
    weight = W::select(empty, F(0.0f), W::fma(weight * or_zero<W>(lost), F(float(-LN2)), weight));
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
  struct Coefficients {  // a_i or b_j and the shift where the exp is shared, weight and lse where it is not
    float weight[K][TILE], lse[K][TILE], offset[K == 2 ? TILE : 1];
  };
  struct Shared {
    LogitVectors logits;
    Coefficients row, col;
    typename TileSums<W>::Shared sums;
  };

  FLASHCL_LANE Grad(const GradArgs& args, Seat<W> seat, Shared& shared)
      : a_(args), seat_(seat), tile_(seat.tile), s_(shared), two_sided_(args.col.weight) {}

  // Masks and coefficients.
  FLASHCL_LANE void load() {
    const I at = seat_.own();
    scale_ = *a_.block.logit_scale * float(LOG2E);
    about_ = a_.sums.about ? *a_.sums.about : 0.0f;
    shared_ = two_sided_ ? lie_together() : K == 1;
    stage<W>(s_.logits.cols, a_.block.col_bias, tile_.m, at, float(LOG2E));
    stage<W>(s_.logits.rows, a_.block.row_bias, tile_.n, at, float(LOG2E));
    coefficients(s_.row, a_.row, tile_.n, at);
    coefficients(s_.col, a_.col, tile_.m, at);
    pairs_.load(a_.block, seat_);
  }

  template <class Acc>
  FLASHCL_LANE void visit(Acc& acc) {
    if (K == 2 || !pairs_.plain || a_.block.row_bias)
      shared_ ? visit_<false, true>(acc) : visit_<false, false>(acc);
    else if constexpr (K == 1)
      shared_ ? visit_<true, true>(acc) : visit_<true, false>(acc);
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
  float scale_, about_;
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
    high = W::warp_max(high);
    low_ = -W::warp_max(-low_);
    const bool close = !W::any(!(high - low_ < F(SPREAD)));
    low_ = or_zero<W>(low_);  // of lines without pairs any will do
    return close;
  }

  FLASHCL_LANE void meet(const Side& side, int k, int tile, I at, int lines, F& high) {
    const F lse = W::load(side.lse + k * side.stride + int64_t(tile) * TILE, at) * F(float(LOG2E));
    const B counts = (at < I(lines - tile * TILE)) & (lse != F(-INF));
    high = W::max(high, W::select(counts, lse, F(-INF)));
    low_ = W::min(low_, W::select(counts, lse, F(INF)));
  }

  // Stages those of line `at`.
  FLASHCL_LANE void coefficients(Coefficients& to, const Side& side, int tile, I at) {
    const bool low = shared_ && two_sided_;
    FLASHCL_UNROLL
    for (int k = 0; k < K; ++k) {
      const Coefficient<W> line(side, k, tile, at);
      W::store(to.weight[k], at, low ? line.weight * W::exp2(low_ - line.lse) : line.weight, B(true));
      W::store(to.lse[k], at, low ? low_ : line.lse, B(true));
    }
    if constexpr (K == 2) stage<W>(to.offset, side.offset, tile, at);
  }

  // A row or a column that a lane meets.
  struct Line {
    F weight[K], lse[K], offset;

    Line() = default;
    FLASHCL_LANE Line(const Coefficients& from, I at) {
      FLASHCL_UNROLL
      for (int k = 0; k < K; ++k) {
        weight[k] = W::load_shared(from.weight[k], at);
        lse[k] = W::load_shared(from.lse[k], at);
      }
      offset = K == 2 ? W::load_shared(from.offset, at) : F(0.0f);
    }

    FLASHCL_LANE F of(B positive, const F (&v)[K]) const { return K == 1 ? v[0] : W::select(positive, v[K - 1], v[0]); }
  };

  template <bool PLAIN, bool SHARED, class Acc>
  FLASHCL_LANE void visit_(Acc& acc) {
    TileSums<W> sums(a_.sums, a_.block, seat_, s_.sums);
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      // Anew for every chunk: registers, and it keeps the compiler to their order.
      if constexpr (K == 2) pairs_.forget();
      const Logits<W> logits{scale_, s_.logits, seat_};
      Line row[R];
      FLASHCL_UNROLL
      for (int r = 0; r < R; ++r) row[r] = Line(s_.row, seat_.row(r));
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        const I at = seat_.col(chunk, q);
        const Line col(s_.col, at);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const int i = Fragment::place(r, chunk, q);
          const F product = acc[i];
          const auto exp_less = [&](F shift) {
            return W::exp2(PLAIN ? logits.plain(product, shift) : logits.of(product, shift, r, at));
          };
          const B positive = pairs_.positive(i);
          const F a = row[r].of(positive, row[r].weight), b = col.of(positive, col.weight);
          F g;
          if (SHARED)  // with two classes they have the same shift
            g = exp_less(row[r].lse[0]) * (a + b);
          else
            g = W::fma(a, exp_less(row[r].of(positive, row[r].lse)), b * exp_less(col.of(positive, col.lse)));
          if (K == 2) g = g - W::select(positive, row[r].offset + col.offset, F(0.0f));
          if (!PLAIN) g = W::select(pairs_.dropped(i), F(0.0f), g);
          sums.scaled = W::fma(g, product - F(about_), sums.scaled);
          acc[i] = W::settled(g);
        }
      }
      sums.add(acc, chunk);
    }
    sums.store();
  }
};

}  // namespace flashcl
