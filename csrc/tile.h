// Which tile of S comes when, and which of its logits a lane holds.
#pragma once

#include "lanes.h"

namespace flashcl {

// Rows and columns of a tile. 128 x 128 accumulators are 128 registers in each of the 128 threads of a warpgroup; 128 x
// 192 would leave 40 for an epilogue with coefficients of rows and columns.
constexpr int TILE = 128;

// A cluster is two CTAs, with a tile each, one below the other: pieces of y come from L2 once for both. Clusters of 2 x 2
// would ask less of L2, but all four would wait for each other, and on an H200 four of 132 processors would have no
// cluster: 3 to 8 % slower (bench/NOTES.md).
constexpr int CLUSTER = 2;

// Rows of units that run together: 4 x 256 rows of x stay in L2 while y passes by.
constexpr unsigned GROUP = 4;

FLASHCL_BOTH int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Place {
  int n, m;  // in tiles
};

// Unit number u of n x m: down GROUP rows, then one to the right, so that a wave shares rows and columns in L2.
FLASHCL_BOTH Place grouped(unsigned u, unsigned n, unsigned m) {
  const unsigned first = u / (GROUP * m) * GROUP, i = u - first * m, height = n - first;
  if (height >= GROUP) return {int(first + i % GROUP), int(i / GROUP)};  // divisions by a constant are quick
  return {int(first + i % height), int(i / height)};
}

// Unit number u of the triangle m >= n of `size` rows, folded into a rectangle without a unit to spare.
//
// Row r of the rectangle is row r of the triangle, size - r long, and behind it the row that fills it up: the r-th from
// below where the size is even, the (r - 1)-th where it is odd (row 0 then fills its row alone).
FLASHCL_BOTH Place folded(int u, int size) {
  const int odd = size % 2;
  const Place at = grouped(u, (size + odd) / 2, size + 1 - odd);
  if (at.n + at.m < size) return {at.n, at.n + at.m};
  return {size - 1 + odd - at.n, at.m - 1 + odd};
}

// The work of a launch. A unit is what a cluster does at a time, CLUSTER tiles one below the other. Units number far less
// than 2^31: blocks are bounded by the workspace.
struct Schedule {
  int tiles_n, tiles_m;
  bool triangular;  // only the tiles on and above the diagonal

  FLASHCL_BOTH int units() const {
    const int n = ceil_div(tiles_n, CLUSTER);
    return triangular ? CLUSTER * (n * (n + 1) / 2) : n * tiles_m;
  }

  // The tile of a CTA, `rank` in its cluster. Triangles are walked square by square, CLUSTER units beside each other.
  FLASHCL_BOTH Place at(int unit, int rank) const {
    const int n = ceil_div(tiles_n, CLUSTER);
    if (!triangular) {
      const Place place = grouped(unit, n, tiles_m);
      return {CLUSTER * place.n + rank, place.m};
    }
    const Place square = folded(unit / CLUSTER, n);
    return {CLUSTER * square.n + rank, CLUSTER * square.m + unit % CLUSTER};
  }

  // Units reach past the edges and below the diagonal by less than themselves: such a tile is computed and thrown away.
  FLASHCL_BOTH bool wanted(Place tile) const {
    return tile.n < tiles_n && tile.m < tiles_m && !(triangular && tile.m < tile.n);
  }
};

// The accumulators of wgmma m64n128, two of them one below the other. Lane l of warp w holds, for
// b = 0..1 (which wgmma), j = 0..15, h = 0..1, e = 0..1, the logit of
//
//     row 64 b + 16 w + 8 h + l / 4,   column 8 j + 2 (l % 4) + e      at place 64 b + 4 j + 2 h + e.
//
// A lane meets 4 rows, r = 2 b + h, and 32 columns; a row lies in the 4 lanes of a quad, a column in 8 lanes of 4
// warps. Columns are walked in 4 chunks of 32, of which a lane meets 8: q = 0..7, j = 4 chunk + q / 2, e = q % 2.
struct Fragment {
  static constexpr int PLACES = 128, ROWS = 4, CHUNKS = 4, COLS = 8;

  static FLASHCL_BOTH constexpr int place(int r, int chunk, int q) {
    return 64 * (r / 2) + 4 * (4 * chunk + q / 2) + 2 * (r % 2) + q % 2;
  }
  template <class I>
  static FLASHCL_BOTH I row(int warp, I lane, int r) {
    return I(64 * (r / 2) + 16 * warp + 8 * (r % 2)) + lane / 4;
  }
  template <class I>
  static FLASHCL_BOTH I col(I lane, int chunk, int q) {
    return I(32 * chunk + 8 * (q / 2) + q % 2) + I(2) * (lane % 4);
  }
};

// A lane of a warpgroup that works on a tile. `lane` is read anew for every tile: were it the same to the compiler, it
// would compute the addresses of all 128 places once and keep them beside the accumulators, in memory.
template <class W>
struct Seat {
  Place tile;
  int warp;  // 0..3
  typename W::I lane = W::lane();

  FLASHCL_LANE typename W::I row(int r) const { return Fragment::row(warp, lane, r); }
  FLASHCL_LANE typename W::I col(int chunk, int q) const { return Fragment::col(lane, chunk, q); }
  FLASHCL_LANE typename W::I own() const { return lane + typename W::I(32 * warp); }  // one row and one column each
  FLASHCL_LANE typename W::B writes_row() const { return lane % 4 == typename W::I(0); }  // one lane of a quad
};

}  // namespace flashcl
