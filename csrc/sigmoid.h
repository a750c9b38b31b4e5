// The loss of one tile and its gradient in one pass: sums of weight_i softplus(s_ij) along the rows, and
//
//     G_ij = weight_i sigmoid(s_ij).
//
// Both come from one exp(-|s|), and from fewer terms of it where no logit of a warp is near 0. Dropped pairs have
// s = -inf, where both are 0. Logits are in bits.
#pragma once

#include "logits.h"
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
    LogitVectors logits;
    float weight[TILE];  // of the rows
    typename TileSums<W>::Shared sums;
  };

  FLASHCL_LANE Sigmoid(const SigmoidArgs& args, Seat<W> seat, Shared& shared)
      : a_(args), seat_(seat), tile_(seat.tile), s_(shared) {}

  FLASHCL_LANE void load() {
    const I at = seat_.own();
    scale_ = *a_.block.logit_scale * float(LOG2E);
    stage<W>(s_.logits.rows, a_.block.row_bias, tile_.n, at, float(LOG2E));
    stage<W>(s_.logits.cols, a_.block.col_bias, tile_.m, at, float(LOG2E));
    stage<W>(s_.weight, a_.weight, tile_.n, at);
    pairs_.load(a_.block, seat_);
  }

  template <class Acc>
  FLASHCL_LANE void visit(Acc& acc) {
    if (!pairs_.plain)
      visit_<false, Soft<W>>(acc);
    else if (far(acc))
      visit_<true, FarSoft<W>>(acc);
    else
      visit_<true, Soft<W>>(acc);
  }

  FLASHCL_LANE void finish() { TileSums<W>(a_.sums, a_.block, seat_, s_.sums).finish(); }

 private:
  const SigmoidArgs& a_;
  Seat<W> seat_;
  Place tile_;
  Shared& s_;
  Pairs<W, Program> pairs_;
  float scale_;

  // Whether all logits of the warp are below FAR, by the largest product of each row. Of NaN both ways give NaN.
  template <class Acc>
  FLASHCL_LANE bool far(const Acc& acc) const {
    if (!(scale_ > 0.0f)) return false;
    const Logits<W> logits{scale_, s_.logits, seat_};
    typename W::B near = false;
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) {
      F top = F(-INF);
      FLASHCL_UNROLL
      for (int i = 0; i < Fragment::CHUNKS * C; ++i) top = W::max(top, acc[Fragment::place(r, i / C, i % C)]);
      near = near | !(logits.plain(top, -logits.row(r)) <= F(FAR));
    }
    return !W::any(near);
  }

  template <bool PLAIN, class Soft, class Acc>
  FLASHCL_LANE void visit_(Acc& acc) {
    F weight[R], plus[R];
    for (F& sum : plus) sum = F(0.0f);
    TileSums<W> sums(a_.sums, a_.block, seat_, s_.sums);
    FLASHCL_UNROLL
    for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk) {
      // Anew for every chunk: it keeps the compiler to their order. All at once, most of them would wait for registers.
      const Logits<W> logits{scale_, s_.logits, seat_};
      FLASHCL_UNROLL
      for (int r = 0; r < R; ++r) weight[r] = W::load_shared(s_.weight, seat_.row(r));
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) {
          const int i = Fragment::place(r, chunk, q);
          const F product = acc[i];
          F t = PLAIN ? logits.plain(product, -logits.row(r)) : logits.of(product, 0.0f, r, seat_.col(chunk, q));
          if (!PLAIN) t = W::select(pairs_.dropped(i), F(-INF), t);
          const Soft soft(t);
          plus[r] = soft.added_to(plus[r]);
          const F g = weight[r] * soft.sigmoid();
          sums.scaled = W::fma(g, product, sums.scaled);
          acc[i] = W::settled(g);
        }
      }
      sums.add(acc, chunk);
    }
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) sums.store_row(a_.sums.softplus, r, weight[r] * (plus[r] * F(float(LN2))));
    sums.store();
  }
};

}  // namespace flashcl
