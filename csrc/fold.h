// Merges the statistics that a sweep left of every tile into those of the lines, in a fixed order.
//
// A line is folded by FOLDERS of them: each takes every FOLDERS-th tile, then their results are merged one after the
// other. Totals are float64: one more rounding per tile would show in a line of many tiles.
#pragma once

#include "numerics.h"

namespace flashcl {

// The statistics (K, 2, T, stride) of T tiles, tops in bits, merged into out (K, 2, n) whose planes are out_plane
// elements apart.
struct FoldArgs {
  const float* sums;
  float* out;
  int K, T, n;
  int64_t stride, out_plane;
  bool first;  // out holds nothing yet: it is not read
  bool last;   // out becomes the log-sum-exp, in nats, as two floats, in place of top and total
};

constexpr int FOLDERS = 8;

// The sum of 2^(t - top) over some logits. Over none top is -inf; over +inf it is +inf, and the total too.
struct Statistic {
  float top = -INF;
  double total = 0;

  FLASHCL_BOTH void add(float other_top, double other_total) {
    const float highest = fmaxf(top, other_top), shift = fabsf(highest) < INF ? highest : 0.0f;
    total = total * decay(top - shift) + other_total * decay(other_top - shift);
    top = highest;
  }

  // A total of NaN says more than the top: max ignores NaN.
  FLASHCL_BOTH double log_sum_exp() const {
    return fabsf(top) < INF || total != total ? LN2 * (top + log2(total)) : top;
  }

 private:
  static FLASHCL_BOTH double decay(float x) { return x == 0.0f ? 1.0 : double(exp2f(x)); }
};

// What one of the FOLDERS finds in its tiles of line i of class k.
FLASHCL_BOTH Statistic fold_part(const FoldArgs& a, int k, int i, int folder) {
  const float* tops = a.sums + 2 * k * a.T * a.stride + i;
  const float* totals = tops + a.T * a.stride;
  Statistic part;
  for (int64_t t = folder; t < a.T; t += FOLDERS) part.add(tops[t * a.stride], totals[t * a.stride]);
  return part;
}

FLASHCL_BOTH void fold_parts(const FoldArgs& a, int k, int i, const Statistic (&parts)[FOLDERS]) {
  float *out = a.out + 2 * k * a.out_plane + i, *second = out + a.out_plane;
  Statistic all;
  if (!a.first) all.add(*out, *second);
  for (const Statistic& part : parts) all.add(part.top, part.total);
  const double lse = a.last ? all.log_sum_exp() : 0.0;
  *out = a.last ? float(lse) : all.top;
  *second = !a.last ? float(all.total) : fabs(lse) == double(INF) ? 0.0f : float(lse - double(*out));
}

}  // namespace flashcl
