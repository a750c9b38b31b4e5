// One source for the GPU and for the tests: epilogues are templates over a machine W that has 32 lanes.
//
//   Thread   in .cu files: one lane, the hardware has the other 31. W::F is float.
//   Warp     in .cpp files: all 32 lanes at once, as arrays. W::F is 32 floats.
//
// Branches must be uniform over a warp (W::any), everything else is W::select: then both machines do the same
// operations in the same order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FLASHCL_BOTH __host__ __device__ __forceinline__
#define FLASHCL_LANE __device__ __forceinline__  // what only a lane can run: on the GPU, or in an emulated warp
#define FLASHCL_UNROLL _Pragma("unroll")
#define FLASHCL_ROLLED _Pragma("unroll 1")
#else
#define FLASHCL_BOTH inline
#define FLASHCL_LANE inline
#define FLASHCL_UNROLL
#define FLASHCL_ROLLED
#endif

namespace flashcl {

constexpr float INF = __builtin_huge_valf();

#ifdef __CUDACC__

struct Thread {
  using F = float;
  using I = int;
  using U = uint32_t;
  using B = bool;

  static FLASHCL_LANE I lane() {
    I lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }
  static FLASHCL_LANE F select(B b, F x, F y) { return b ? x : y; }
  static FLASHCL_LANE U select(bool b, U x, U y) { return b ? x : y; }
  static FLASHCL_LANE U bit(B b, int i) { return b ? 1u << i : 0u; }
  static FLASHCL_LANE B has(U bits, int i) { return bits >> i & 1; }
  static FLASHCL_LANE F max(F x, F y) { return fmaxf(x, y); }  // ignores NaN, as the statistics do
  static FLASHCL_LANE F min(F x, F y) { return fminf(x, y); }
  static FLASHCL_LANE F abs(F x) { return fabsf(x); }
  static FLASHCL_LANE F fma(F x, F y, F z) { return fmaf(x, y, z); }
  static FLASHCL_LANE F exp2(F x) {  // relative error 2^-22; results below 2^-126 are 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static FLASHCL_LANE F reciprocal(F x) {  // one unit in the last place
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static FLASHCL_LANE F shuffle_xor(F x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
  static FLASHCL_LANE bool any(B b) { return __any_sync(0xffffffffu, b); }
  // The largest x of the warp, of which none is NaN, in one step where shuffles take five: as integers that are ordered
  // like floats.
  static FLASHCL_LANE F warp_max(F x) {
    const int largest = __reduce_max_sync(0xffffffffu, ordered(__float_as_int(x)));
    return __int_as_float(ordered(largest));
  }

  // x, computed here and now: the compiler would rather put the work on all places off until the end, and spill.
  static FLASHCL_LANE F settled(F x) {
    asm volatile("" : "+f"(x)::"memory");
    return x;
  }
  // i, but not before x is known: loads that need it are not begun earlier, all at once. `zero` is 0, unknown to the compiler.
  static FLASHCL_LANE I after(F x, I i, int zero) { return i + (__float_as_int(x) & zero); }
  static FLASHCL_LANE float after(F x, float y, int zero) { return __int_as_float(after(x, __float_as_int(y), zero)); }
  // x by way of the shuffle unit: what two passes over a tile have in common, ptxas would keep from the first to the
  // second.
  template <class T>
  static FLASHCL_LANE T forgotten(T x) {
    return __shfl_xor_sync(0xffffffffu, x, 0);
  }

  // From global memory, which no kernel writes that it reads: such a load may begin before stores that come first.
  template <class T>
  static FLASHCL_LANE T load(const T* p, I i) {
    return __ldg(p + i);
  }
  template <class T>
  static FLASHCL_LANE T load_shared(const T* p, I i) {
    return p[i];
  }
  static FLASHCL_LANE void store(float* p, I i, F v, B mask) {
    if (mask) p[i] = v;
  }

 private:
  static FLASHCL_LANE int ordered(int bits) { return bits < 0 ? bits ^ 0x7fffffff : bits; }  // its own inverse
};

#else

template <class T>
struct Lanes {
  T v[32];

  Lanes() = default;
  Lanes(T x) {
    for (T& each : v) each = x;
  }
  template <class S>
  explicit Lanes(const Lanes<S>& x) {
    for (int i = 0; i < 32; ++i) v[i] = static_cast<T>(x.v[i]);
  }

  template <class Op>
  static auto each(const Lanes& x, const Lanes& y, Op op) {
    Lanes<decltype(op(T{}, T{}))> out;
    for (int i = 0; i < 32; ++i) out.v[i] = op(x.v[i], y.v[i]);
    return out;
  }
#define FLASHCL_OPERATOR(OP, RESULT)                            \
  friend auto operator OP(const Lanes& x, const Lanes& y) {     \
    return each(x, y, [](T a, T b) { return RESULT(a OP b); }); \
  }
  FLASHCL_OPERATOR(+, T)
  FLASHCL_OPERATOR(-, T)
  FLASHCL_OPERATOR(*, T)
  FLASHCL_OPERATOR(<, bool)
  FLASHCL_OPERATOR(>, bool)
  FLASHCL_OPERATOR(<=, bool)
  FLASHCL_OPERATOR(>=, bool)
  FLASHCL_OPERATOR(==, bool)
  FLASHCL_OPERATOR(!=, bool)
  FLASHCL_OPERATOR(&, T)
  FLASHCL_OPERATOR(|, T)
#undef FLASHCL_OPERATOR
  friend Lanes operator/(const Lanes& x, int d) {
    return each(x, Lanes(d), [](T a, T b) { return a / b; });
  }
  friend Lanes operator%(const Lanes& x, int d) {
    return each(x, Lanes(d), [](T a, T b) { return a % b; });
  }
  friend Lanes operator~(const Lanes& x) {
    return each(x, x, [](T a, T) { return T(~a); });
  }
  friend Lanes operator-(const Lanes& x) {
    return each(x, x, [](T a, T) { return T(-a); });
  }
  friend Lanes<bool> operator!(const Lanes& x) { return x == Lanes(T{}); }
  Lanes& operator+=(const Lanes& x) { return *this = *this + x; }
};

struct Warp {
  using F = Lanes<float>;
  using I = Lanes<int>;
  using U = Lanes<uint32_t>;
  using B = Lanes<bool>;

  static I lane() {
    I out;
    for (int i = 0; i < 32; ++i) out.v[i] = i;
    return out;
  }
  template <class Op>
  static F map(const F& x, Op op) {
    F out;
    for (int i = 0; i < 32; ++i) out.v[i] = op(x.v[i]);
    return out;
  }
  static F select(const B& b, const F& x, const F& y) {
    F out;
    for (int i = 0; i < 32; ++i) out.v[i] = b.v[i] ? x.v[i] : y.v[i];
    return out;
  }
  static U select(bool b, const U& x, const U& y) { return b ? x : y; }
  static U bit(const B& b, int i) {
    U out;
    for (int k = 0; k < 32; ++k) out.v[k] = b.v[k] ? 1u << i : 0u;
    return out;
  }
  static B has(const U& bits, int i) {
    B out;
    for (int k = 0; k < 32; ++k) out.v[k] = bits.v[k] >> i & 1;
    return out;
  }
  static F max(const F& x, const F& y) {
    return F::each(x, y, [](float a, float b) { return std::fmax(a, b); });
  }
  static F min(const F& x, const F& y) {
    return F::each(x, y, [](float a, float b) { return std::fmin(a, b); });
  }
  static F abs(const F& x) {
    return map(x, [](float a) { return std::fabs(a); });
  }
  static F fma(const F& x, const F& y, const F& z) {
    F out;
    for (int i = 0; i < 32; ++i) out.v[i] = std::fma(x.v[i], y.v[i], z.v[i]);
    return out;
  }
  static F exp2(const F& x) {
    return map(x, [](float a) {
      const float y = std::exp2(a);
      return y < 0x1p-126f ? 0.0f : y;
    });
  }
  static F reciprocal(const F& x) {
    return map(x, [](float a) { return 1.0f / a; });
  }
  static F shuffle_xor(const F& x, int mask) {
    F out;
    for (int i = 0; i < 32; ++i) out.v[i] = x.v[i ^ mask];
    return out;
  }
  static bool any(const B& b) {
    for (bool each : b.v)
      if (each) return true;
    return false;
  }
  static F warp_max(const F& x) {
    float largest = -INF;
    for (float each : x.v) largest = std::fmax(largest, each);
    return largest;
  }
  static F settled(const F& x) { return x; }
  template <class T>
  static T after(const F&, const T& i, int) {
    return i;
  }
  template <class T>
  static T forgotten(const T& x) {
    return x;
  }
  template <class T>
  static Lanes<T> load(const T* p, const I& i) {
    Lanes<T> out;
    for (int k = 0; k < 32; ++k) out.v[k] = p[i.v[k]];
    return out;
  }
  template <class T>
  static Lanes<T> load_shared(const T* p, const I& i) {
    return load(p, i);
  }
  static void store(float* p, const I& i, const F& v, const B& mask) {
    for (int k = 0; k < 32; ++k)
      if (mask.v[k]) p[i.v[k]] = v.v[k];
  }
};

#endif

}  // namespace flashcl
