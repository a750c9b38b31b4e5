// From a product <x_i, y_j> to its logit, in bits: scale, biases, and what the pair program says of the pair.
#pragma once

#include "block.h"
#include "numerics.h"

namespace flashcl {

// Pair programs, as engine/problem.py has them. `all` is Different without ids.
struct Different {
  static constexpr int CLASSES = 1;
};
struct ByLabel {
  static constexpr int CLASSES = 2;
};

// Whether a tile can hold equal ids. Ids are mostly ranges of integers: few tiles do.
FLASHCL_LANE bool may_hold_equal_ids(const Block& block, Place tile) {
  if (!block.row_id) return false;
  const int32_t *row = block.row_range + 2 * tile.n, *col = block.col_range + 2 * tile.m;
  return row[0] <= col[1] && col[0] <= row[1];
}

FLASHCL_LANE bool whole(const Block& block, Place tile) {
  return (tile.n + 1) * TILE <= block.N && (tile.m + 1) * TILE <= block.M;
}

// Which pairs of a tile do not count, and which are of class 1: one bit for each place of a lane.
template <class W, class Program>
class Pairs {
  using I = typename W::I;
  using U = typename W::U;
  using B = typename W::B;
  static constexpr int R = Fragment::ROWS;

  U dropped_[4], positive_[4];

 public:
  // All pairs count, as one class, and columns have no bias: as in most tiles. Then nothing here needs to be asked.
  bool plain;

  // Before the product is there: ids and labels would find no registers beside it.
  FLASHCL_LANE void load(const Block& block, const Seat<W>& seat) {
    const bool ids = may_hold_equal_ids(block, seat.tile), inside = whole(block, seat.tile);
    plain = Program::CLASSES == 1 && !ids && inside && !block.col_bias;
    for (U& word : dropped_) word = U(0);
    if (ids || !inside) find_dropped(block, seat, ids);
    if constexpr (Program::CLASSES == 2) find_positive(block, seat);  // ids are no longer needed: fewer registers
  }

  // Before the next places: what was made of the bits of the last ones is not worth its registers.
  FLASHCL_LANE void forget() {
    for (U& word : dropped_) word = W::forgotten(word);
    for (U& word : positive_) word = W::forgotten(word);
  }

  // Whether the pair at a place is outside of the block or dropped.
  FLASHCL_LANE B dropped(int place) const { return W::has(dropped_[place / 32], place % 32); }

  FLASHCL_LANE B positive(int place) const {
    return Program::CLASSES == 2 ? W::has(positive_[place / 32], place % 32) : B(false);
  }

  // The bits of the pairs of class k.
  FLASHCL_LANE void members(U (&bits)[4], int k) const {
    for (int i = 0; i < 4; ++i)
      bits[i] = Program::CLASSES == 1 ? ~dropped_[i] : W::select(k == 1, positive_[i], ~(positive_[i] | dropped_[i]));
  }

 private:
  FLASHCL_LANE void find_dropped(const Block& block, const Seat<W>& seat, bool ids) {
    const int64_t n = int64_t(seat.tile.n) * TILE, m = int64_t(seat.tile.m) * TILE;
    const I rows_left = I(block.N - int(n)), cols_left = I(block.M - int(m));
    I id[R];
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r)  // without equal ids: two numbers that differ
      id[r] = ids ? W::load(block.row_id + n, seat.row(r)) : I(0);
    FLASHCL_UNROLL
    for (int i = 0; i < Fragment::CHUNKS * Fragment::COLS; ++i) {
      const int chunk = i / Fragment::COLS, q = i % Fragment::COLS;
      const I at = seat.col(chunk, q), col_id = ids ? W::load(block.col_id + m, at) : I(1);
      const B outside = !(at < cols_left);
      FLASHCL_UNROLL
      for (int r = 0; r < R; ++r)
        mark(dropped_, r, chunk, q, outside | !(seat.row(r) < rows_left) | (id[r] == col_id));
    }
  }

  FLASHCL_LANE void find_positive(const Block& block, const Seat<W>& seat) {
    const int64_t n = int64_t(seat.tile.n) * TILE, m = int64_t(seat.tile.m) * TILE;
    I label[R];
    FLASHCL_UNROLL
    for (int r = 0; r < R; ++r) label[r] = W::load(block.row_label + n, seat.row(r));
    for (U& word : positive_) word = U(0);
    FLASHCL_UNROLL
    for (int i = 0; i < Fragment::CHUNKS * Fragment::COLS; ++i) {
      const int chunk = i / Fragment::COLS, q = i % Fragment::COLS;
      const I col_label = W::load(block.col_label + m, seat.col(chunk, q));
      FLASHCL_UNROLL
      for (int r = 0; r < R; ++r)
        mark(positive_, r, chunk, q, label[r] == col_label);
    }
    for (int i = 0; i < 4; ++i) positive_[i] = positive_[i] & ~dropped_[i];
  }

  static FLASHCL_LANE void mark(U (&bits)[4], int r, int chunk, int q, B value) {
    const int place = Fragment::place(r, chunk, q);
    bits[place / 32] = bits[place / 32] | W::bit(value, place % 32);
  }
};

// A vector of the rows or columns of tile number `tile` to shared memory, `factor` times, each lane of the warpgroup
// element `at`; 0 if there is none. Before the product is there: then its wait and that for global memory are one. And
// loads from shared memory are so short that the compiler does not begin with all of them, and spill.
template <class W>
FLASHCL_LANE void stage(float (&to)[TILE], const float* p, int tile, typename W::I at, float factor = 1.0f) {
  using F = typename W::F;
  W::store(to, at, p ? W::load(p + int64_t(tile) * TILE, at) * F(factor) : F(0.0f), typename W::B(true));
}

// What the logits of a tile are made of, in bits.
struct LogitVectors {
  float rows[TILE], cols[TILE];  // their biases
};

// The logits of the rows that a lane meets, less a shift. Masks are applied by the caller, who needs them for other
// things, too.
//
// A logit and its shift may be hundreds of bits, of which the rounding would be seen in 2^(t - shift): the shift is
// subtracted in the multiplication, before anything is rounded, and biases are added to the small number that is left.
// For rows without bias, the first is all.
template <class W>
struct Logits {
  using F = typename W::F;

  float scale;
  const LogitVectors& vectors;
  Seat<W> seat;

  // Of a product, where there are no biases; then of one in row r and column `at`, where there may be.
  FLASHCL_LANE F plain(F product, F shift) const { return W::fma(product, F(scale), F(0.0f) - shift); }
  FLASHCL_LANE F of(F product, F shift, int r, typename W::I at) const {
    return plain(product, shift) + row(r) + W::load_shared(vectors.cols, at);
  }
  FLASHCL_LANE F row(int r) const { return W::load_shared(vectors.rows, seat.row(r)); }

  // Loads no more before x is known (see Thread::after).
  FLASHCL_LANE void wait_for(F x, int zero) {
    scale = W::after(x, scale, zero);
    seat.lane = W::after(x, seat.lane, zero);
  }

  // For another pass: nothing of the last one is worth keeping.
  FLASHCL_LANE void forget() {
    scale = W::forgotten(scale);
    seat.lane = W::forgotten(seat.lane);
  }
};

}  // namespace flashcl
