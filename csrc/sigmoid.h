// The loss of one tile and its gradient in one pass: sums of weight_i softplus(s_ij) along the rows, and
//
//     G_ij = weight_i sigmoid(s_ij).
//
// Both come from one exp(-|s|). Dropped pairs have s = -inf, where both are 0.
#pragma once

#include "logits.h"
#include "numerics.h"
#include "sums.h"

namespace flashcl {

struct SigmoidArgs {
  Block block;
  const float* weight;  // (N,), 0 past the edge
  Sums sums;
  Output out;
};

template <class W, class Program>
class Sigmoid {
  using F = typename W::F;
  using I = typename W::I;
  static constexpr int R = Fragment::ROWS, C = Fragment::COLS;

 public:
  struct Shared {
    float bias[TILE];  // of the columns
    typename TileSums<W>::Shared sums;
  };

  FLASHCL_LANE Sigmoid(const SigmoidArgs& args, Seat<W> seat, Shared& shared)
      : a_(args), seat_(seat), tile_(seat.tile), s_(shared) {}

  FLASHCL_LANE void load() {
    pairs_.load(a_.block, seat_);
    stage<W>(s_.bias, a_.block.col_bias, tile_.m, seat_.own_col());
  }

  template <class Acc>
  FLASHCL_LANE void visit(Acc& acc) {
    pairs_.masked ? visit_<true>(acc) : visit_<false>(acc);
  }

  FLASHCL_LANE void finish() { TileSums<W>(a_.sums, a_.block, seat_, s_.sums).finish(); }

 private:
  const SigmoidArgs& a_;
  Seat<W> seat_;
  Place tile_;
  Shared& s_;
  Pairs<W, Program> pairs_;

  template <bool MASKED, class Acc>
  FLASHCL_LANE void visit_(Acc& acc) {
    const RowBias<W> row_bias(a_.block, seat_);
    const float scale = *a_.block.logit_scale;
    F weight[R], plus[R];
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      weight[r] = W::load(a_.weight + int64_t(tile_.n) * TILE, seat_.row(r));
      plus[r] = F(0.0f);
    }
    TileSums<W> sums(a_.sums, a_.block, seat_, s_.sums);
    const F about = F(sums.about());
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        const I at = seat_.col(chunk, q);
        const F bias = W::load_shared(s_.bias, at);
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const int i = Fragment::place(r, chunk, q);
          const F product = acc[i];
          F s = logit<W>(product, scale, row_bias.at[r], bias);
          if (MASKED) s = W::select(pairs_.dropped(i), F(-INF), s);
          const Soft<W> soft(s);
          plus[r] += soft.plus;
          const F g = weight[r] * soft.sigmoid;
          sums.scaled = W::fma(g, product - about, sums.scaled);
          acc[i] = W::settled(g);
        }
      }
      sums.add(acc, chunk);
    }
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) sums.store_row(a_.sums.softplus, r, weight[r] * plus[r]);
    sums.store();
  }
};

}  // namespace flashcl
