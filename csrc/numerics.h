// The few functions of a logit, and the rules for the shifts that keep exp in range.
#pragma once

#include "lanes.h"

namespace flashcl {

// With one top for the rows and columns of a warp, terms exp(s - top) below 2^-126 are lost, at most 2^7 of them in a
// line: less than 2^-119 together. A total above TINY has thus lost less than 2^-29 of itself, a
// thirty-second of the float32 rounding unit.
constexpr float TINY = 0x1p-90f;

// Where the log-sum-exps of a tile lie within SPREAD of each other, e = exp(s - lowest) serves its rows and its
// columns. Overflow would allow 80; but s - lowest is rounded by up to half a unit in the last place of the spread,
// which at 8 is 5e-7 of the result.
constexpr float SPREAD = 8.0f;

// A shift that is always finite: exp(-inf - 0) = 0 and exp(inf - 0) = inf is what the totals should have.
template <class W>
FLASHCL_LANE typename W::F or_zero(typename W::F top) {
  using F = typename W::F;
  return W::select(W::abs(top) < F(INF), top, F(0.0f));
}

// log(1 + e) for 0 <= e <= 1, relative error below 2e-7: minimax polynomial of log1p(e) / e, no cancellation at small
// e.
template <class W>
FLASHCL_LANE typename W::F log1p(typename W::F e) {
  using F = typename W::F;
  F p = W::fma(F(0.005232688f), e, F(-0.029505214f));
  p = W::fma(p, e, F(0.078225911f));
  p = W::fma(p, e, F(-0.136632428f));
  p = W::fma(p, e, F(0.191060051f));
  p = W::fma(p, e, F(-0.248429820f));
  p = W::fma(p, e, F(0.333190978f));
  p = W::fma(p, e, F(-0.499994934f));
  p = W::fma(p, e, F(0.999999940f));
  return p * e;
}

// softplus(s) = max(s, 0) + log1p(e) and sigmoid(s) = (s >= 0 ? 1 : e) / (1 + e), both from e = exp(-|s|) <= 1.
template <class W>
struct Soft {
  typename W::F plus, sigmoid;

  FLASHCL_LANE explicit Soft(typename W::F s) {
    using F = typename W::F;
    const F e = W::exp(F(0.0f) - W::abs(s));
    plus = W::max(s, F(0.0f)) + log1p<W>(e);
    sigmoid = W::select(s >= F(0.0f), F(1.0f), e) * W::reciprocal(F(1.0f) + e);
  }
};

}  // namespace flashcl
