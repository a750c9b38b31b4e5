// What every kernel is told of a block of logits. All pointers are on the device of the embeddings.
#pragma once

#include <cstdint>

#include "tile.h"

namespace flashcl {

// s_ij = logit_scale <x_i, y_j> + row_bias_i + col_bias_j
//
// Vectors are contiguous and go on to the end of the last tile; what they hold past the edge does not matter.
struct Block {
  // Embeddings (N, D) and (M, D), bfloat16 or float16, 16-byte aligned,
  // D and the strides between rows multiples of 8 elements.
  const void *x, *y;
  int64_t x_stride, y_stride;
  int N, M, D;
  bool half;        // float16, else bfloat16
  bool triangular;  // x is y: walk only the tiles on and above the diagonal

  const float* logit_scale;              // (1,)
  const float *row_bias, *col_bias;      // (N,), (M,), or null: 0
  const int32_t *row_id, *col_id;        // (N,), (M,), or null: pairs with equal ids are dropped
  const int32_t *row_range, *col_range;  // (tiles, 2): the smallest and the largest id of each tile
  const int32_t *row_label, *col_label;  // (N,), (M,), or null: other pairs with equal labels are of class 1

  static FLASHCL_BOTH Schedule schedule(int N, int M, bool triangular) {
    return {ceil_div(N, TILE), ceil_div(M, TILE), triangular};
  }
  FLASHCL_BOTH Schedule schedule() const { return schedule(N, M, triangular); }
};

// The statistics that a sweep leaves of every line (row or column) in every tile that it passes through. Padded to
// whole tiles: what lies past the edges is stored, and looked at by nobody.
struct Lines {
  float* sums;          // (K, 2, T, n): top in bits, and total = sum of 2^(t - top), of every class; null if not wanted
  const float* center;  // (n,) or null: 0
  float* deviation;     // (T, n) or null: sum of s - center over the positives
};

// log-sum-exps of the lines of a block, as coefficients: G_ij = weight exp(s_ij - lse) (- offset, where the class is
// 1). Lines without pairs have lse -inf: their G is 0, whatever their weight.
struct Side {
  const float* weight;  // (K, stride); null where no gradient comes through these lines
  const float* lse;     // (K, stride)
  const float* offset;  // (n,) or null
  int64_t stride;
};

// Where sums over tiles go, each null if not wanted.
struct Sums {
  float* rows;         // (tiles_m, N): of G
  float* cols;         // (tiles_n, M): of G
  float* softplus;     // (tiles_m, N): of weight_i softplus(s_ij)
  float* scaled;       // (tiles_n, tiles_m): of G_ij (<x_i, y_j> - about)
  const float* about;  // (1,) or null: 0
};

// Where G goes.
struct Output {
  void* g;  // (N, M) padded to whole tiles, in the dtype of x, rows `stride` elements apart; null if not wanted
  int64_t stride;
};

}  // namespace flashcl
