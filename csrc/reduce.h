// Sums of a tile along its rows and columns, in an order that depends on nothing but the place.
#pragma once

#include "tile.h"

namespace flashcl {

// The sum over the 4 lanes of a quad, in each of them.
template <class W>
FLASHCL_LANE typename W::F quad_sum(typename W::F x) {
  x += W::shuffle_xor(x, 1);
  x += W::shuffle_xor(x, 2);
  return x;
}

template <class W>
FLASHCL_LANE typename W::F quad_max(typename W::F x) {
  x = W::max(x, W::shuffle_xor(x, 1));
  return W::max(x, W::shuffle_xor(x, 2));
}

template <class W>
FLASHCL_LANE typename W::F warp_sum(typename W::F x) {
  FLASHCL_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += W::shuffle_xor(x, mask);
  return x;
}

struct Add {
  template <class W>
  static FLASHCL_LANE typename W::F of(typename W::F x, typename W::F y) {
    return x + y;
  }
};
struct Max {
  template <class W>
  static FLASHCL_LANE typename W::F of(typename W::F x, typename W::F y) {
    return W::max(x, y);
  }
};

// The 8 columns of a chunk that a lane meets, over the 8 lanes that meet them: 7 shuffles where one column after the
// other would take 24. In each of 3 steps a lane gives away half of its columns and keeps the other half: lane l ends
// with column q = l / 4.
template <class W, class Op>
FLASHCL_LANE typename W::F butterfly(typename W::F (&col)[Fragment::COLS], typename W::I lane) {
  FLASHCL_UNROLL
  for (int half = 4; half > 0; half /= 2) {
    const typename W::B upper = (lane / (4 * half)) % 2 != typename W::I(0);
    FLASHCL_UNROLL
    for (int q = 0; q < half; ++q) {
      const typename W::F mine = W::select(upper, col[q + half], col[q]),
                          theirs = W::select(upper, col[q], col[q + half]);
      col[q] = Op::template of<W>(mine, W::shuffle_xor(theirs, 4 * half));
    }
  }
  return col[0];
}

// The column that butterfly leaves in a lane: Fragment::col of q = lane / 4.
template <class W>
FLASHCL_LANE typename W::I butterfly_col(int chunk, typename W::I lane) {
  const typename W::I q = lane / 4;
  return typename W::I(32 * chunk) + typename W::I(8) * (q / 2) + q % 2 + typename W::I(2) * (lane % 4);
}

}  // namespace flashcl
