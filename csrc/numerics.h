// The few functions of a logit, and the rules for the shifts that keep exp in range.
//
// Logits are in bits, t = s log2(e): 2^t is one instruction, e^s two. That rounds the scale, and with it every logit,
// by up to 2^-24 of itself: as much as each of its products has been rounded.
#pragma once

#include "lanes.h"

namespace flashcl {

constexpr double LN2 = 0.6931471805599453, LOG2E = 1.4426950408889634;

// One shift for the rows and columns of a warp is right where every line has a total, the sum of 2^(t - shift), between
// TINY and LARGE. Terms below 2^-126 are lost, at most 2^7 of them in a line, less than 2^-119 together: a total above
// TINY has thus lost less than 2^-29 of itself, a thirty-second of the float32 rounding unit. Below LARGE t - shift is
// rounded by at most 2^-19 (of 16 bits, whose gradients end at 2^-9).
constexpr float TINY = 0x1p-90f, LARGE = 0x1p60f;

// Where the log-sum-exps of a tile lie within SPREAD of each other, e = 2^(t - lowest) serves its rows and its columns.
// Overflow would allow 120; but t - lowest is rounded by up to half a unit in the last place of the spread, which here
// is 3e-7 of the result.
constexpr float SPREAD = 8.0f * float(LOG2E);

// A shift that is always finite: 2^(-inf - 0) = 0 and 2^(inf - 0) = inf is what the totals should have.
template <class W>
FLASHCL_LANE typename W::F or_zero(typename W::F top) {
  using F = typename W::F;
  return W::select(W::abs(top) < F(INF), top, F(0.0f));
}

// softplus(s) = max(s, 0) + log(1 + e) and sigmoid(s) = (s >= 0 ? 1 : e) / (1 + e), both from e = exp(-|s|) <= 1.
template <class W>
struct Soft {
  using F = typename W::F;
  F t, e;

  FLASHCL_LANE explicit Soft(F t) : t(t), e(W::exp2(-W::abs(t))) {}

  FLASHCL_LANE F sigmoid() const { return W::select(t >= F(0.0f), F(1.0f), e) * W::reciprocal(F(1.0f) + e); }

  // sum + softplus in bits. log2(1 + e), relative error below 4e-7: minimax polynomial of log2(1 + e) / e, no
  // cancellation at small e.
  FLASHCL_LANE F added_to(F sum) const {
    F p = W::fma(F(-0.0123194586f), e, F(0.0636078343f));
    p = W::fma(p, e, F(-0.155351788f));
    p = W::fma(p, e, F(0.256009668f));
    p = W::fma(p, e, F(-0.353394806f));
    p = W::fma(p, e, F(0.480063677f));
    p = W::fma(p, e, F(-0.721310079f));
    p = W::fma(p, e, F(1.44269478f));
    return W::fma(p, e, sum + W::max(t, F(0.0f)));
  }
};

// The same where t <= FAR: e is so small that a few terms do, in half of the instructions. So most pairs are that SigLIP
// meets.
constexpr float FAR = -6.0f;

template <class W>
struct FarSoft {
  using F = typename W::F;
  F e;

  FLASHCL_LANE explicit FarSoft(F t) : e(W::exp2(t)) {}

  // e / (1 + e), relative error below 2e-7
  FLASHCL_LANE F sigmoid() const {
    const F q = W::fma(F(0.976968029f), e, F(-0.999865717f));
    return e * W::fma(q, e, F(0.999999884f));
  }

  // Relative error below 1e-7.
  FLASHCL_LANE F added_to(F sum) const {
    F p = W::fma(F(0.472562374f), e, F(-0.721298871f));
    p = W::fma(p, e, F(1.442695f));
    return W::fma(p, e, sum);
  }
};

}  // namespace flashcl
