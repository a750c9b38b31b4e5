// What is done once for every row of the embeddings, O(N D): its product with the one column that is its partner, and
// the last step of its gradient.
//
// A warp takes a row, a lane of it VECTOR elements at a time: 16 bytes where they are of 16 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lanes.h"

namespace flashcl {

constexpr int VECTOR = 8;

enum class Type { BFLOAT16, FLOAT16, FLOAT32 };

// (rows, D), the elements of a row side by side.
struct Rows {
  void* data;
  int64_t stride;  // from row to row, in elements
  Type type;
  bool aligned;  // rows begin at multiples of 16 bytes
};

// out_i = <x_i, y_j> with j = (i + shift) mod M
struct PartnerArgs {
  Rows x, y;    // (N, D), (M, D), 16 bits
  double* out;  // (N,)
  int64_t N, M, shift;  // 0 <= shift < M
  int D;
};

// out_i = scale (acc_i + weight_i other_j) with j = (i + shift) mod C; from row n on scale acc_i
struct FinishArgs {
  Rows acc, other, out;         // (R, D) float32, (C, D) 16 bits, (R, D); out may be acc
  const float *weight, *scale;  // (n,), (1,)
  int64_t R, C, n, shift;       // 0 <= shift < C
  int D;
};

// ---- elements ----

template <class T>
struct alignas(16) Vector {
  T v[16 / sizeof(T)];
};

FLASHCL_BOTH float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FLASHCL_BOTH float to_float(__half x) { return __half2float(x); }
FLASHCL_BOTH float to_float(float x) { return x; }
FLASHCL_BOTH void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
FLASHCL_BOTH void round_to(__half& to, float x) { to = __float2half_rn(x); }
FLASHCL_BOTH void round_to(float& to, float x) { to = x; }

// VECTOR elements from column k on, 0 past the end.
template <class T>
FLASHCL_BOTH void read(const T* p, bool whole, int left, float (&out)[VECTOR]) {
  constexpr int EACH = 16 / sizeof(T);
  FLASHCL_UNROLL
  for (int i = 0; i < VECTOR; i += EACH) {
    Vector<T> v;
    if (whole) v = *reinterpret_cast<const Vector<T>*>(p + i);
    FLASHCL_UNROLL
    for (int e = 0; e < EACH; ++e) out[i + e] = whole ? to_float(v.v[e]) : i + e < left ? to_float(p[i + e]) : 0.0f;
  }
}

template <class T>
FLASHCL_BOTH void write(T* p, bool whole, int left, const float (&x)[VECTOR]) {
  constexpr int EACH = 16 / sizeof(T);
  FLASHCL_UNROLL
  for (int i = 0; i < VECTOR; i += EACH) {
    Vector<T> v;
    FLASHCL_UNROLL
    for (int e = 0; e < EACH; ++e) {
      round_to(v.v[e], x[i + e]);
      if (!whole && i + e < left) p[i + e] = v.v[e];
    }
    if (whole) *reinterpret_cast<Vector<T>*>(p + i) = v;
  }
}

// What `of` makes of the elements of a row from column k on: their pointer, whether they are a whole vector, and how
// many are left.
template <class Of>
FLASHCL_BOTH void elements(const Rows& x, int64_t row, int k, int D, Of of) {
  const int64_t at = row * x.stride + k;
  const bool whole = x.aligned && D - k >= VECTOR;
  if (x.type == Type::BFLOAT16)
    of(static_cast<__nv_bfloat16*>(x.data) + at, whole, D - k);
  else if (x.type == Type::FLOAT16)
    of(static_cast<__half*>(x.data) + at, whole, D - k);
  else
    of(static_cast<float*>(x.data) + at, whole, D - k);
}

FLASHCL_BOTH void load(const Rows& x, int64_t row, int k, int D, float (&out)[VECTOR]) {
  elements(x, row, k, D, [&](const auto* p, bool whole, int left) { read(p, whole, left, out); });
}

FLASHCL_BOTH void store(const Rows& x, int64_t row, int k, int D, const float (&v)[VECTOR]) {
  elements(x, row, k, D, [&](auto* p, bool whole, int left) { write(p, whole, left, v); });
}

// ---- what a lane does ----

// (i + shift) mod size. All three are below 2^31, so that 32 bits hold the sum: a division of 64 is a call.
FLASHCL_BOTH int64_t partner_of(int64_t i, int64_t shift, int64_t size) { return uint32_t(i + shift) % uint32_t(size); }

// Its share of a product. Products of 16 bits are exact in float32, and so are their sums in float64, but for a few
// last bits: errors of a positive logit are not made up for by anything.
FLASHCL_BOTH double partner_part(const PartnerArgs& a, int64_t i, int lane) {
  const int64_t j = partner_of(i, a.shift, a.M);
  double sum = 0;
  for (int k = lane * VECTOR; k < a.D; k += 32 * VECTOR) {
    float x[VECTOR], y[VECTOR];
    load(a.x, i, k, a.D, x);
    load(a.y, j, k, a.D, y);
    FLASHCL_UNROLL
    for (int e = 0; e < VECTOR; ++e) sum += double(x[e] * y[e]);
  }
  return sum;
}

FLASHCL_BOTH void finish_part(const FinishArgs& a, int64_t i, int lane) {
  const bool has = i < a.n;
  const int64_t j = has ? partner_of(i, a.shift, a.C) : 0;
  const float weight = has ? a.weight[i] : 0.0f, scale = *a.scale;
  for (int k = lane * VECTOR; k < a.D; k += 32 * VECTOR) {
    float acc[VECTOR], other[VECTOR];
    load(a.acc, i, k, a.D, acc);
    if (has) load(a.other, j, k, a.D, other);
    FLASHCL_UNROLL
    for (int e = 0; e < VECTOR; ++e) acc[e] = scale * (has ? fmaf(weight, other[e], acc[e]) : acc[e]);
    store(a.out, i, k, a.D, acc);
  }
}

}  // namespace flashcl
