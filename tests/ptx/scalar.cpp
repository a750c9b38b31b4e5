// Operations of one thread: arithmetic, memory, branches.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <stdexcept>

#include "machine.h"

namespace ptx {

std::map<std::string, Handler> collective_operations();  // collective.cpp

namespace {

using S16 = int16_t;
using U16 = uint16_t;
using S32 = int32_t;
using U32 = uint32_t;
using S64 = int64_t;
using U64 = uint64_t;
using F32 = float;
using F64 = double;
using Pred = bool;

using Table = std::map<std::string, Handler>;

// d = op(a, b, ...) with operands and result of these types.
template <class Result, class... Operands, class Op, size_t... I>
Then apply(Thread& t, const Instruction& i, Op op, std::index_sequence<I...>) {
  if (i.args.size() != 1 + sizeof...(I)) throw std::runtime_error("not so many operands: " + i.text);
  t.set<Result>(i.args[0], static_cast<Result>(op(t.get<Operands>(i.args[I + 1])...)));
  return Then::NEXT;
}

#define OPERATION(NAME, RESULT, OPERANDS, ...)                                              \
  table[NAME] = [](Thread& t, const Instruction& i) {                                       \
    return [&]<class... Each>(std::tuple<Each...>*) {                                       \
      return apply<RESULT, Each...>(t, i, __VA_ARGS__, std::index_sequence_for<Each...>{}); \
    }(static_cast<std::tuple<OPERANDS>*>(nullptr));                                         \
  }
#define LIST(...) __VA_ARGS__
#define UNARY(NAME, T, E) OPERATION(NAME, T, T, [](T a) { return E; })
#define BINARY(NAME, T, E) OPERATION(NAME, T, LIST(T, T), [](T a, T b) { return E; })

template <class T>
T flushed(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x;
}

// A number in [-1, 1] that depends on x alone, as the error of an approximation does.
template <class T>
double error_at(T x) {
  U64 bits = 0;
  __builtin_memcpy(&bits, &x, sizeof(T));
  bits = (bits ^ 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  return double(S64((bits ^ bits >> 29) * 0x94d049bb133111eb)) / 0x1p63;
}

// Approximations are as far off as the manual lets them be.
F32 exp2_approximate(F32 x) {  // relative error 2^-22; 1 at 0
  return F32(x == 0 ? 1 : std::exp2(F64(x)) * (1 + 0x1p-22 * error_at(x)));
}
F32 reciprocal_approximate(F32 x) {  // one unit in the last place
  const F32 y = 1 / flushed(x);
  return std::isnormal(y) ? flushed(std::nextafter(y, error_at(x) > 0 ? 2 * y : 0)) : flushed(y);
}
F64 reciprocal_approximate(F64 x) {  // the upper half of its bits
  const F64 y = 1 / flushed(x);
  U64 bits;
  __builtin_memcpy(&bits, &y, 8);
  bits &= ~U64(0xffffffff);
  F64 out;
  __builtin_memcpy(&out, &bits, 8);
  return out;
}

float fma_down(float a, float b, float c) {
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  volatile float x = a, y = b, z = c, out = std::fma(x, y, z);
  std::fesetround(before);
  return out;
}

// Four bytes of a (0 to 3) and b (4 to 7), or of their signs (+ 8).
U32 permuted(U32 a, U32 b, U32 which) {
  const U64 both = U64(b) << 32 | a;
  U32 out = 0;
  for (int k = 0; k < 4; ++k) {
    const U32 from = which >> 4 * k & 15, byte = both >> 8 * (from & 7) & 255;
    out |= (from < 8 ? byte : byte >> 7 ? 255u : 0u) << 8 * k;
  }
  return out;
}

// `length` bits of a from `at` on.
template <class T>
T extract(T a, U32 at, U32 length) {
  at &= 255, length &= 255;
  if (length == 0) return 0;
  if (at > 31) return a < 0 ? T(-1) : T(0);
  const U32 top = std::min(31u, at + length - 1);
  return T(U32(a) << (31 - top)) >> (31 - top + at);
}

void arithmetic(Table& table) {
#define FLOATS(SUFFIX, T)                                        \
  BINARY("add." SUFFIX, T, a + b);                               \
  BINARY("sub." SUFFIX, T, a - b);                               \
  BINARY("mul." SUFFIX, T, a* b);                                \
  BINARY("max." SUFFIX, T, std::fmax(a, b));                     \
  BINARY("min." SUFFIX, T, std::fmin(a, b));                     \
  UNARY("abs." SUFFIX, T, std::fabs(a));                         \
  UNARY("neg." SUFFIX, T, -a);                                   \
  UNARY("rcp.approx.ftz." SUFFIX, T, reciprocal_approximate(a)); \
  OPERATION("fma.rn." SUFFIX, T, LIST(T, T, T), [](T a, T b, T c) { return std::fma(a, b, c); })
  FLOATS("f32", F32);
  FLOATS("f64", F64);
  UNARY("ex2.approx.ftz.f32", F32, flushed(exp2_approximate(flushed(a))));
  UNARY("ex2.approx.f32", F32, exp2_approximate(a));
  BINARY("div.full.f32", F32, F32(F64(a) / b * (1 + 0x1p-22 * error_at(a * b))));  // two units in the last place
  OPERATION("fma.rn.ftz.f32", F32, LIST(F32, F32, F32),
            [](F32 a, F32 b, F32 c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); });
  OPERATION("fma.rm.f32", F32, LIST(F32, F32, F32), fma_down);

  // Unsigned inside: what overflows wraps.
#define INTEGERS(SUFFIX, T, UNSIGNED)                                               \
  BINARY("add." SUFFIX, T, UNSIGNED(a) + UNSIGNED(b));                              \
  BINARY("sub." SUFFIX, T, UNSIGNED(a) - UNSIGNED(b));                              \
  BINARY("mul.lo." SUFFIX, T, UNSIGNED(a) * UNSIGNED(b));                           \
  BINARY("max." SUFFIX, T, a > b ? a : b);                                          \
  BINARY("min." SUFFIX, T, a < b ? a : b);                                          \
  BINARY("div." SUFFIX, T, a / b);                                                  \
  BINARY("rem." SUFFIX, T, a % b);                                                  \
  UNARY("neg." SUFFIX, T, -UNSIGNED(a));                                            \
  OPERATION("mad.lo." SUFFIX, T, LIST(T, T, T),                                     \
            [](T a, T b, T c) { return UNSIGNED(a) * UNSIGNED(b) + UNSIGNED(c); }); \
  OPERATION("shr." SUFFIX, T, LIST(T, U32), [](T a, U32 by) {                       \
    constexpr U32 last = 8 * sizeof(T) - 1;                                         \
    return by <= last ? a >> by : (a < 0 ? T(-1) : T(0));                           \
  })
  INTEGERS("s16", S16, U32);
  INTEGERS("u16", U16, U32);
  INTEGERS("s32", S32, U32);
  INTEGERS("u32", U32, U32);
  INTEGERS("s64", S64, U64);
  INTEGERS("u64", U64, U64);
  OPERATION("mul.wide.s32", S64, LIST(S32, S32), [](S32 a, S32 b) { return S64(a) * b; });
  OPERATION("mad.wide.s32", S64, LIST(S32, S32, S64), [](S32 a, S32 b, S64 c) { return S64(a) * b + c; });
  OPERATION("mad.wide.u32", U64, LIST(U32, U32, U64), [](U32 a, U32 b, U64 c) { return U64(a) * b + c; });
  OPERATION("prmt.b32", U32, LIST(U32, U32, U32), permuted);
  OPERATION("bfe.u32", U32, LIST(U32, U32, U32), extract<U32>);
  OPERATION("bfe.s32", S32, LIST(S32, U32, U32), extract<S32>);
  OPERATION("mul.wide.u32", U64, LIST(U32, U32), [](U32 a, U32 b) { return U64(a) * b; });

#define BITS(SUFFIX, T)            \
  BINARY("and." SUFFIX, T, a& b);  \
  BINARY("or." SUFFIX, T, a | b);  \
  BINARY("xor." SUFFIX, T, a ^ b); \
  UNARY("not." SUFFIX, T, ~a);     \
  OPERATION("shl." SUFFIX, T, LIST(T, U32), [](T a, U32 by) { return by < 8 * sizeof(T) ? T(a << by) : T(0); })
  BITS("b16", U16);
  BITS("b32", U32);
  BITS("b64", U64);
  BINARY("and.pred", Pred, a && b);
  BINARY("or.pred", Pred, a || b);
  BINARY("xor.pred", Pred, a != b);
  UNARY("not.pred", Pred, !a);
  OPERATION("bfi.b32", U32, LIST(U32, U32, U32, U32), [](U32 a, U32 b, U32 at, U32 length) {
    at &= 255, length &= 255;
    if (at > 31) return b;
    const U32 mask = (length < 32 ? (1u << length) - 1 : ~0u) << at;
    return (b & ~mask) | (a << at & mask);
  });
}

void comparisons(Table& table) {
#define COMPARE(NAME, T, E) OPERATION("setp." NAME, Pred, LIST(T, T), [](T a, T b) { return E; })
#define EQUALITY(SUFFIX, T)         \
  COMPARE("eq." SUFFIX, T, a == b); \
  COMPARE("ne." SUFFIX, T, a != b)
#define ORDER(SUFFIX, T)            \
  COMPARE("lt." SUFFIX, T, a < b);  \
  COMPARE("le." SUFFIX, T, a <= b); \
  COMPARE("gt." SUFFIX, T, a > b);  \
  COMPARE("ge." SUFFIX, T, a >= b)
#define INTEGER_ORDER(SUFFIX, T) \
  EQUALITY(SUFFIX, T);           \
  ORDER(SUFFIX, T)
#define FLOAT_ORDER(SUFFIX, T)                                 \
  ORDER(SUFFIX, T);                                            \
  COMPARE("eq." SUFFIX, T, a == b);                            \
  COMPARE("ne." SUFFIX, T, a<b || a> b);                       \
  COMPARE("equ." SUFFIX, T, !(a < b || a > b));                \
  COMPARE("neu." SUFFIX, T, !(a == b));                        \
  COMPARE("ltu." SUFFIX, T, !(a >= b));                        \
  COMPARE("leu." SUFFIX, T, !(a > b));                         \
  COMPARE("gtu." SUFFIX, T, !(a <= b));                        \
  COMPARE("geu." SUFFIX, T, !(a < b));                         \
  COMPARE("num." SUFFIX, T, !std::isnan(a) && !std::isnan(b)); \
  COMPARE("nan." SUFFIX, T, std::isnan(a) || std::isnan(b))
  INTEGER_ORDER("s16", S16);
  INTEGER_ORDER("u16", U16);
  INTEGER_ORDER("s32", S32);
  INTEGER_ORDER("u32", U32);
  INTEGER_ORDER("s64", S64);
  INTEGER_ORDER("u64", U64);
  EQUALITY("b16", U16);
  EQUALITY("b32", U32);
  EQUALITY("b64", U64);
  FLOAT_ORDER("f32", F32);
  FLOAT_ORDER("f64", F64);
}

template <class T>
void typed_moves(Table& table, const std::string& suffix) {
  OPERATION("mov." + suffix, T, T, [](T a) { return a; });
  OPERATION("selp." + suffix, T, LIST(T, T, Pred), [](T a, T b, Pred p) { return p ? a : b; });
}

// {d, e, ...} = a, of Part each; or the other way round.
template <class Part>
Then unpack(Thread& t, const Instruction& i) {
  if (i.args.size() != 3) throw std::runtime_error("not two halves: " + i.text);
  const U64 from = t.get<U64>(i.args.back());
  for (size_t k = 0; k + 1 < i.args.size(); ++k) t.set<Part>(i.args[k], Part(from >> 8 * sizeof(Part) * k));
  return Then::NEXT;
}
template <class Part>
Then pack(Thread& t, const Instruction& i) {
  if (i.args.size() != 3) throw std::runtime_error("not two halves: " + i.text);
  U64 to = 0;
  for (size_t k = 1; k < i.args.size(); ++k) to |= U64(t.get<Part>(i.args[k])) << 8 * sizeof(Part) * (k - 1);
  t.set<U64>(i.args[0], to);
  return Then::NEXT;
}

template <class T>
std::string integer_name() {
  return (std::is_signed_v<T> ? "s" : "u") + std::to_string(8 * sizeof(T));
}
template <class To, class From>
void integer_conversion(Table& table) {
  OPERATION("cvt." + integer_name<To>() + "." + integer_name<From>(), To, From, [](From a) { return To(a); });
}
template <class To, class... Froms>
void integer_conversions_to(Table& table) {
  (integer_conversion<To, Froms>(table), ...);
}
template <class... Types>
void integer_conversions(Table& table, std::tuple<Types...>) {
  (integer_conversions_to<Types, Types...>(table), ...);
}

U16 half(F32 a) { return __half_raw(__float2half_rn(a)).x; }
U16 brain(F32 a) { return __nv_bfloat16_raw(__float2bfloat16_rn(a)).x; }

void moves(Table& table) {
  for (const char* bits : {"16", "32", "64"})
    for (const char* kind : {"b", "u", "s", "f"}) {
      const std::string suffix = std::string(kind) + bits;
      bits[0] == '1'   ? typed_moves<U16>(table, suffix)
      : bits[0] == '3' ? typed_moves<U32>(table, suffix)
                       : typed_moves<U64>(table, suffix);
    }
  UNARY("mov.pred", Pred, a);
  table["unpack.b64"] = unpack<U32>, table["pack.b64"] = pack<U32>;
  table["unpack.b32"] = unpack<U16>, table["pack.b32"] = pack<U16>;

#define CONVERT(NAME, TO, FROM, ...) OPERATION("cvt." NAME, TO, FROM, __VA_ARGS__)
  integer_conversions(table, std::tuple<S16, U16, S32, U32, S64, U64>{});
  CONVERT("rn.f32.s32", F32, S32, [](S32 a) { return F32(a); });
  CONVERT("f64.f32", F64, F32, [](F32 a) { return F64(a); });
  CONVERT("rn.f32.f64", F32, F64, [](F64 a) { return F32(a); });
  CONVERT("sat.f32.f32", F32, F32, [](F32 a) { return a > 0 ? (a < 1 ? a : 1) : 0; });
  CONVERT("f32.f16", F32, U16, [](U16 a) { return __half2float(__half_raw{a}); });
  CONVERT("f32.bf16", F32, U16, [](U16 a) { return __bfloat162float(__nv_bfloat16_raw{a}); });
  CONVERT("rn.f16.f32", U16, F32, half);
  CONVERT("rn.bf16.f32", U16, F32, brain);
  OPERATION("cvt.rn.f16x2.f32", U32, LIST(F32, F32),
            [](F32 high, F32 low) { return U32(half(high)) << 16 | half(low); });
  OPERATION("cvt.rn.bf16x2.f32", U32, LIST(F32, F32),
            [](F32 high, F32 low) { return U32(brain(high)) << 16 | brain(low); });
}

// ---- memory: an address is one of this process, but in shared memory ----

template <bool SHARED>
char* address(Thread& t, const Instruction& i, int operand, size_t bytes) {
  const U64 at = t.get<U64>(i.args[operand]) + t.get<U64>(i.args[operand + 1]);
  if (at % bytes) throw std::runtime_error("misaligned: " + i.text);
  if (!SHARED && at - reinterpret_cast<U64>(t.cta->memory.get()) < t.cta->bytes)
    throw std::runtime_error("shared memory by a generic address: " + i.text);
  return SHARED ? t.cta->at(U32(at), bytes) : reinterpret_cast<char*>(at);
}

template <class T, int N, bool SHARED>
Then load(Thread& t, const Instruction& i) {
  const char* from = address<SHARED>(t, i, N, N * sizeof(T));
  for (int k = 0; k < N; ++k) {
    T value;
    __builtin_memcpy(&value, from + k * sizeof(T), sizeof(T));
    t.set<T>(i.args[k], value);
  }
  return Then::NEXT;
}

template <class T, int N, bool SHARED>
Then store(Thread& t, const Instruction& i) {
  char* to = address<SHARED>(t, i, 0, N * sizeof(T));
  for (int k = 0; k < N; ++k) {
    const T value = t.get<T>(i.args[2 + k]);
    __builtin_memcpy(to + k * sizeof(T), &value, sizeof(T));
  }
  if (SHARED) t.cta->wrote(t.tid, U32(to - t.cta->memory.get()), N * sizeof(T));
  return Then::NEXT;
}

template <class T>
void typed_memory(Table& table, const std::string& suffix) {
  for (const char* space : {".param.", ".global.", "."}) {
    table["ld" + (space + suffix)] = load<T, 1, false>, table["st" + (space + suffix)] = store<T, 1, false>;
    table["ld" + (space + ("v2." + suffix))] = load<T, 2, false>,
                                   table["st" + (space + ("v2." + suffix))] = store<T, 2, false>;
    table["ld" + (space + ("v4." + suffix))] = load<T, 4, false>,
                                   table["st" + (space + ("v4." + suffix))] = store<T, 4, false>;
  }
  table["ld.global.nc." + suffix] = load<T, 1, false>;
  table["ld.shared." + suffix] = load<T, 1, true>, table["st.shared." + suffix] = store<T, 1, true>;
  table["ld.shared.v2." + suffix] = load<T, 2, true>, table["st.shared.v2." + suffix] = store<T, 2, true>;
  table["ld.shared.v4." + suffix] = load<T, 4, true>, table["st.shared.v4." + suffix] = store<T, 4, true>;
}

void memory(Table& table) {
  for (const char* kind : {"u", "b"}) {
    typed_memory<uint8_t>(table, kind + std::string("8"));
    typed_memory<U16>(table, kind + std::string("16"));
    typed_memory<U32>(table, kind + std::string("32"));
    typed_memory<U64>(table, kind + std::string("64"));
  }
  typed_memory<U32>(table, "s32");
  typed_memory<U64>(table, "s64");
  typed_memory<F32>(table, "f32");
  typed_memory<F64>(table, "f64");
  for (const char* space : {"param", "to.global", "global"}) UNARY("cvta." + std::string(space) + ".u64", U64, a);
  table["cvta.shared.u64"] = [](Thread& t, const Instruction& i) {
    t.set<U64>(i.args[0], reinterpret_cast<U64>(t.cta->memory.get()) + t.get<U32>(i.args[1]) - SHARED_BASE);
    return Then::NEXT;
  };
  table["cvta.to.shared.u64"] = [](Thread& t, const Instruction& i) {
    const U64 offset = t.get<U64>(i.args[1]) - reinterpret_cast<U64>(t.cta->memory.get());
    if (offset > t.cta->bytes) throw std::runtime_error("not an address of shared memory: " + i.text);
    t.set<U64>(i.args[0], offset + SHARED_BASE);
    return Then::NEXT;
  };
}

void control(Table& table) {
  table["bra"] = table["bra.uni"] = [](Thread& t, const Instruction& i) { return t.pc = i.target, Then::JUMPED; };
  table["ret"] = table["exit"] = [](Thread&, const Instruction&) { return Then::EXITS; };
}

Table operations() {
  Table table = collective_operations();
  arithmetic(table);
  comparisons(table);
  moves(table);
  memory(table);
  control(table);
  return table;
}

// Shared memory is that of the CTA, whether PTX says so ("shared::cta") or not.
std::string without_cta(std::string operation) {
  for (size_t at; (at = operation.find("::cta")) != std::string::npos;) operation.erase(at, 5);
  return operation;
}

}  // namespace

Handler handler(const std::string& operation) {
  static const Table table = operations();
  const auto found = table.find(without_cta(operation));
  return found == table.end() ? nullptr : found->second;
}

}  // namespace ptx
