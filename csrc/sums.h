// Sums of the G of a tile, taken before G is rounded to 16 bits.
#pragma once

#include "block.h"
#include "reduce.h"

namespace flashcl {

template <class W>
class TileSums {
  using F = typename W::F;
  using I = typename W::I;
  using B = typename W::B;
  static constexpr int R = Fragment::ROWS, C = Fragment::COLS;

 public:
  struct Shared {
    float cols[4][TILE], scaled[4];  // by the warps
  };

  F scaled = F(0.0f);  // of G_ij (<x_i, y_j> - about), over the lane's places

  FLASHCL_LANE TileSums(const Sums& sums, const Block& block, const Seat<W>& seat, Shared& shared)
      : a_(sums), block_(block), seat_(seat), tile_(seat.tile), s_(shared) {
    for (F& sum : row_) sum = F(0.0f);
  }

  // The G of a chunk of columns, complete in acc.
  template <class Acc>
  FLASHCL_LANE void add(const Acc& acc, int chunk) {
    if (a_.rows) {
      FLASHCL_UNROLL
      for (int q = 0; q < C; ++q) {
        FLASHCL_UNROLL
        for (int r = 0; r < R; ++r) row_[r] += acc[Fragment::place(r, chunk, q)];
      }
    }
    if (!a_.cols) return;
    F col[C];
    FLASHCL_UNROLL
    for (int q = 0; q < C; ++q) {
      col[q] = F(0.0f);
      FLASHCL_UNROLL
      for (int r = 0; r < R; ++r) col[q] += acc[Fragment::place(r, chunk, q)];
    }
    W::store(s_.cols[seat_.warp], butterfly_col<W>(chunk, seat_.lane), butterfly<W, Add>(col, seat_.lane), B(true));
  }

  // What a warp knows of the whole tile.
  FLASHCL_LANE void store() {
    if (a_.rows) {
      FLASHCL_UNROLL
      for (int r = 0; r < R; ++r) store_row(a_.rows, r, row_[r]);
    }
    if (a_.scaled) W::store(s_.scaled, I(seat_.warp), warp_sum<W>(scaled), seat_.lane == I(0));
  }

  // The sum of a quad's values of row r to `sums` (tiles_m, N).
  FLASHCL_LANE void store_row(float* sums, int r, F value) const {
    const int64_t line = (int64_t(tile_.m) * block_.schedule().tiles_n + tile_.n) * TILE;
    W::store(sums + line, seat_.row(r), quad_sum<W>(value), seat_.writes_row());
  }

  // Merges the 4 warps.
  FLASHCL_LANE void finish() {
    const int64_t tile = int64_t(tile_.n) * block_.schedule().tiles_m + tile_.m;
    if (a_.cols) {
      const I at = seat_.own();
      F sum = W::load_shared(s_.cols[0], at);
      FLASHCL_UNROLL
      for (int w = 1; w < 4; ++w) sum += W::load_shared(s_.cols[w], at);
      W::store(a_.cols + tile * TILE, at, sum, B(true));
    }
    if (a_.scaled && seat_.warp == 0) {
      const float sum = ((s_.scaled[0] + s_.scaled[1]) + s_.scaled[2]) + s_.scaled[3];
      W::store(a_.scaled + tile, I(0), F(sum), seat_.lane == I(0));
    }
  }

 private:
  const Sums& a_;
  const Block& block_;
  const Seat<W>& seat_;
  Place tile_;
  Shared& s_;
  F row_[R];
};

}  // namespace flashcl
