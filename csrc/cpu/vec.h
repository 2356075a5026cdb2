// The SIMD vocabulary: the functions that formulas call, on at::vec::Vectorized.
//
// float: own polynomials (minimax, fitted in 60 digits), one exp and one division per logistic.
// double: the vector maths that torch ships (Sleef, 1 ULP).
// A bound in ULP is what tests/ulp.cpp measures against float64 over the float32 bit patterns.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../formulas/formula.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

template <class T>
using Vec = at::vec::Vectorized<T>;
using F32 = Vec<float>;
using F64 = Vec<double>;
using I32 = Vec<int32_t>;

template <class V>
FASTVAE_INLINE V num(double v) {
  return V(static_cast<typename V::value_type>(v));
}

// Masks: bits of a mask register on AVX-512, lanes of all ones elsewhere. Comparisons with NaN are
// false.
#if defined(CPU_CAPABILITY_AVX512)
template <class V>
using Mask = std::conditional_t<std::is_same_v<V, F32>, __mmask16, __mmask8>;
#define FASTVAE_COMPARE(name, op, OP)                         \
  FASTVAE_INLINE __mmask16 name(const F32& a, const F32& b) { \
    return _mm512_cmp_ps_mask(a, b, OP);                      \
  }                                                           \
  FASTVAE_INLINE __mmask8 name(const F64& a, const F64& b) { return _mm512_cmp_pd_mask(a, b, OP); }
FASTVAE_INLINE F32 select(__mmask16 m, const F32& yes, const F32& no) {
  return _mm512_mask_blend_ps(m, no, yes);
}
FASTVAE_INLINE F64 select(__mmask8 m, const F64& yes, const F64& no) {
  return _mm512_mask_blend_pd(m, no, yes);
}
template <class V>
FASTVAE_INLINE bool all(const Mask<V>& m) {
  return m == static_cast<Mask<V>>(-1);
}
// The lanes as bits.
template <class V>
FASTVAE_INLINE uint32_t bits(const Mask<V>& m) {
  return m;
}
#else
template <class V>
using Mask = V;
#define FASTVAE_COMPARE(name, op, OP)                                    \
  FASTVAE_INLINE F32 name(const F32& a, const F32& b) { return a op b; } \
  FASTVAE_INLINE F64 name(const F64& a, const F64& b) { return a op b; }
#if defined(CPU_CAPABILITY_AVX2) && defined(__GNUC__)
// GCC 12 makes a second comparison of a mask that the intrinsic blends by.
FASTVAE_INLINE F32 select(const F32& m, const F32& yes, const F32& no) {
  __m256 r;
  asm("vblendvps %3, %2, %1, %0" : "=x"(r) : "x"(__m256(no)), "x"(__m256(yes)), "x"(__m256(m)));
  return r;
}
FASTVAE_INLINE F64 select(const F64& m, const F64& yes, const F64& no) {
  __m256d r;
  asm("vblendvpd %3, %2, %1, %0" : "=x"(r) : "x"(__m256d(no)), "x"(__m256d(yes)), "x"(__m256d(m)));
  return r;
}
#else
template <class V>
FASTVAE_INLINE V select(const V& m, const V& yes, const V& no) {
  return V::blendv(no, yes, m);
}
#endif
template <class V>
FASTVAE_INLINE bool all(const Mask<V>& m) {
  return m.zero_mask() == 0;
}
template <class V>
FASTVAE_INLINE uint32_t bits(const Mask<V>& m) {
  return ~static_cast<uint32_t>(m.zero_mask()) & ((1u << V::size()) - 1);
}
#endif
template <class V>
FASTVAE_INLINE bool any(const Mask<V>& m) {
  return bits<V>(m) != 0;
}
FASTVAE_COMPARE(less, <, _CMP_LT_OQ)
FASTVAE_COMPARE(less_equal, <=, _CMP_LE_OQ)
FASTVAE_COMPARE(equal, ==, _CMP_EQ_OQ)
#undef FASTVAE_COMPARE

template <class V>
FASTVAE_INLINE Mask<V> between(const V& low, const V& x, const V& high) {
  return less_equal(low, x) & less_equal(x, high);
}

// wide[…] += v, lane by lane.
FASTVAE_INLINE void add_wide(const F32& v, F64 (&wide)[2]) {
#if defined(CPU_CAPABILITY_AVX512)
  const F64 low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)),
            high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(CPU_CAPABILITY_AVX2)
  const F64 low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)),
            high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  float narrow[F32::size()];
  double lanes[F32::size()];
  v.store(narrow);
  for (int j = 0; j < F32::size(); ++j) lanes[j] = static_cast<double>(narrow[j]);
  const F64 low = F64::loadu(lanes), high = F64::loadu(lanes + F64::size());
#endif
  wide[0] = wide[0] + low;
  wide[1] = wide[1] + high;
}
FASTVAE_INLINE void add_wide(const F64& v, F64 (&wide)[1]) { wide[0] = wide[0] + v; }

// Whether each lane lies in the domain; NaN does in `real` alone.
template <Domain domain, class V>
FASTVAE_INLINE Mask<V> in_domain(const V& x) {
  const V zero = num<V>(0);
  if constexpr (domain == Domain::unit)
    return between(zero, x, num<V>(1));
  else if constexpr (domain == Domain::nonnegative)
    return less_equal(zero, x);
  else if constexpr (domain == Domain::positive)
    return less(zero, x);
  else
    return less_equal(zero, x) & equal(x, x.round()) &
           less(x, num<V>(std::numeric_limits<double>::infinity()));
}

// Whether all that was added lies in the domain. May say no to −0 as well: who gets a no looks
// again.
template <class V, Domain domain>
class Inside {
 public:
  FASTVAE_INLINE void add(const V& x) { inside_ = inside_ & in_domain<domain>(x); }
  FASTVAE_INLINE bool all() const { return fastvae::all<V>(inside_); }

 private:
  Mask<V> inside_ = equal(num<V>(0), num<V>(0));
};

template <class V>
class Inside<V, Domain::real> {
 public:
  FASTVAE_INLINE void add(const V&) {}
  FASTVAE_INLINE bool all() const { return true; }
};

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// Non-negative floats are ordered as their bits are; NaN and negative ones come behind, unsigned.
template <>
class Inside<F32, Domain::unit> {
 public:
#if defined(CPU_CAPABILITY_AVX512)
  FASTVAE_INLINE void add(const F32& x) { most_ = _mm512_max_epu32(most_, _mm512_castps_si512(x)); }
  FASTVAE_INLINE bool all() const {
    return _mm512_cmpgt_epu32_mask(most_, _mm512_set1_epi32(one)) == 0;
  }

 private:
  static constexpr int32_t one = 0x3f800000;
  __m512i most_ = _mm512_setzero_si512();
#else
  FASTVAE_INLINE void add(const F32& x) { most_ = _mm256_max_epu32(most_, _mm256_castps_si256(x)); }
  FASTVAE_INLINE bool all() const {
    const __m256i limit = _mm256_set1_epi32(one);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(most_, limit), limit)) == -1;
  }

 private:
  static constexpr int32_t one = 0x3f800000;
  __m256i most_ = _mm256_setzero_si256();
#endif
};
#endif

// c[0] + c[1] x + … in pairs (Estrin): half the latency of Horner's rule, which bounds the loops.
template <class V, size_t N>
FASTVAE_INLINE V polynomial_pairs(const V& x, const V (&c)[N]) {
  if constexpr (N == 1) {
    return c[0];
  } else {
    V p[(N + 1) / 2];
    for (size_t i = 0; i < N / 2; ++i) p[i] = fmadd(x, c[2 * i + 1], c[2 * i]);
    if (N % 2) p[N / 2] = c[N - 1];
    return polynomial_pairs(x * x, p);
  }
}

// The constant is added last, by Horner's rule: its rounding is then the only one that counts.
template <class V, size_t N>
FASTVAE_INLINE V polynomial(const V& x, const float (&coefficients)[N]) {
  V c[N - 1];
  for (size_t i = 1; i < N; ++i) c[i - 1] = V(coefficients[i]);
  return fmadd(x, polynomial_pairs(x, c), V(coefficients[0]));
}

// p · 2^n for n in [−252, 252]; overflows to ∞ and rounds into the subnormals.
FASTVAE_INLINE F32 scale2(const F32& p, const F32& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  const I32 i = at::vec::convert_to_int_of_same_size(n);
  const I32 half = i >> I32(1), bias(127), mantissa(23);  // in two factors: 2^±150 is no float
  return p * at::vec::cast<float>((half + bias) << mantissa) *
         at::vec::cast<float>((i - half + bias) << mantissa);
#endif
}

// e^x = p · 2^n with p in [√½, √2], for |x| < 2²² or NaN; products with it are ≤ 1.2 ULP off, and
// half a one for their own rounding. e^x itself need not be a float: e^x · 0 is 0 for every x.
struct ExpFactor32 {
  F32 p, n;
  friend FASTVAE_INLINE F32 operator*(const ExpFactor32& e, const F32& a) {
    return scale2(e.p * a, e.n);
  }
};

FASTVAE_INLINE ExpFactor32 exp_unclamped(const F32& x) {
  const F32 n = (x * F32(1.44269504f)).round();
  F32 r = fmadd(n, F32(-0.693359375f), x);  // ln 2 in two parts; n times the first is exact
  r = fmadd(n, F32(2.12194440e-4f), r);
  constexpr float c[] = {0.49999991059303284f, 0.16666419804096222f, 0.041668232530355453f,
                         0.008374898694455624f, 0.0013836740981787443f};
  return {F32(1.f) + fmadd(r * r, polynomial(r, c), r), n};
}

// e^x as a factor, for every x: beyond ±174 every product with a float but 0 is 0 or ∞ even when
// squared. at::vec's clamps keep NaN.
FASTVAE_INLINE ExpFactor32 exp_factor(const F32& x) {
  return exp_unclamped(at::vec::clamp(x, F32(-174.f), F32(174.f)));
}

// e^x for every x; ≤ 1.2 ULP.
FASTVAE_INLINE F32 exp(const F32& x) {
  const ExpFactor32 e = exp_unclamped(at::vec::clamp(x, F32(-104.f), F32(89.f)));
  return scale2(e.p, e.n);
}

// table[i mod 8] for each lane.
FASTVAE_INLINE F32 lookup8(const float (&table)[8], const I32& i) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_permutexvar_ps(i, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
#elif defined(__aarch64__)
  // Byte by byte: 4 (i mod 8) + 0, 1, 2, 3.
  const uint32x4_t bytes = vmlaq_n_u32(
      vdupq_n_u32(0x03020100), vandq_u32(vreinterpretq_u32_s32(i), vdupq_n_u32(7)), 0x04040404);
  const auto* p = reinterpret_cast<const uint8_t*>(table);
  return vreinterpretq_f32_u8(
      vqtbl2q_u8({{vld1q_u8(p), vld1q_u8(p + 16)}}, vreinterpretq_u8_u32(bytes)));
#else
  int32_t at[I32::size()];
  float out[F32::size()];
  i.store(at);
  for (int j = 0; j < F32::size(); ++j) out[j] = table[at[j] & 7];
  return F32::loadu(out);
#endif
}

// The bits of each lane shifted by a constant; `>>` keeps the sign.
template <int places>
FASTVAE_INLINE I32 shift_left(const I32& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return I32(_mm512_slli_epi32(x, places));
#elif defined(CPU_CAPABILITY_AVX2)
  return I32(_mm256_slli_epi32(x, places));
#else
  return x << I32(places);
#endif
}

// Zeros come in from the left.
template <int places>
FASTVAE_INLINE I32 shift_right_unsigned(const I32& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return I32(_mm512_srli_epi32(x, places));
#elif defined(CPU_CAPABILITY_AVX2)
  return I32(_mm256_srli_epi32(x, places));
#else
  return (x >> I32(places)) & I32(static_cast<int32_t>(~0u >> places));
#endif
}

// e^x = 2^(j/8) e^r · 2^⌊n⌋ with |r| ≤ ln 2 / 16 and j / 8 the fraction of n.
struct Eighths {
  F32 n;           // a multiple of 1/8
  I32 bits;        // the integer 8 n, but for its upper bits
  F32 value, low;  // 2^(j/8) e^r, and what its rounding left over
};

FASTVAE_INLINE Eighths exp_parts(const F32& x) {
  // 2^(j/8), and the relative error of its rounding.
  static constexpr float head[8] = {1.f,         1.09050775f, 1.18920708f, 1.29683959f,
                                    1.41421354f, 1.54221082f, 1.68179286f, 1.8340081f};
  static constexpr float tail[8] = {0.f,
                                    -1.19921571e-8f,
                                    3.19341809e-8f,
                                    -3.09907208e-8f,
                                    1.71142713e-8f,
                                    5.23333425e-9f,
                                    -1.47196054e-8f,
                                    -6.12825982e-9f};
  constexpr float c[] = {0.5f, 0.16667887568473816f, 0.04166870191693306f};
  const F32 magic(0x1.8p20f);  // its last place is 1/8: adding it rounds to eighths
  const F32 shifted = fmadd(x, F32(1.44269504f), magic), n = shifted - magic;
  const I32 bits = at::vec::cast<int32_t>(shifted);
  const F32 t = lookup8(head, bits), t_tail = lookup8(tail, bits);
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
  // x − n ln 2 is exact in one fma; what ln 2 lacks is added to r late, beside the polynomial.
  const F32 r = fmadd(n, F32(-0.693147182f), x);
  const F32 fine = r + fmadd(n, F32(1.90465430e-9f), t_tail);
#else
  // ln 2 in two parts; n times the first is exact.
  const F32 r = fmadd(n, F32(2.12194440e-4f), fmadd(n, F32(-0.693359375f), x));
  const F32 fine = r + t_tail;
#endif
  const F32 p = fmadd(r * r, fmadd(fmadd(F32(c[2]), r, F32(c[1])), r, F32(c[0])), fine);
  const F32 value = fmadd(t, p, t);
  return {n, bits, value, fmadd(t, p, t - value)};
}

// e^x, or half of it, for x in [−104, 90] or NaN. Where there is no instruction for it, 2^n is made
// in one step as 2^(n + up), which must be a normal number, times 2^−up, where the result is
// rounded. `low`: what the rounding left over.
template <int up, bool half = false>
FASTVAE_INLINE F32 exp_eighths(const F32& x, F32* low = nullptr) {
  static_assert(up == 64 || up == -64);
  const Eighths e = exp_parts(x);
#if defined(CPU_CAPABILITY_AVX512)
  const F32 n = half ? e.n - F32(1.f) : e.n;
  if (low) *low = _mm512_scalef_ps(e.low, n);
  return _mm512_scalef_ps(e.value, n);  // by 2^⌊n⌋
#else
  constexpr int32_t magic_eighths = 0x49c00000 >> 3;
  const F32 power =
      at::vec::cast<float>(shift_left<23>((e.bits >> I32(3)) + I32(127 + up - magic_eighths)));
  const F32 back((up > 0 ? 0x1p-64f : 0x1p64f) * (half ? 0.5f : 1.f));
  if (low) *low = e.low * power * back;
  return e.value * power * back;
#endif
}

// e^x for x ≤ 0, its sign bit set, in fewer steps than exp; ≤ 0.8 ULP.
FASTVAE_INLINE F32 exp_negative(const F32& x) {
#if defined(CPU_CAPABILITY_AVX2)
  // n is added to the exponent where that stays normal, 5 cycles sooner than two multiplications.
  const __m256i limit = _mm256_castps_si256(F32(-87.f));  // as integers: NaN lies beyond it too
  const __m256i far = _mm256_cmpgt_epi32(_mm256_castps_si256(x), limit);
  if (__builtin_expect(_mm256_movemask_ps(_mm256_castsi256_ps(far)) == 0, 1)) {
    const Eighths e = exp_parts(x);
    return at::vec::cast<float>(at::vec::cast<int32_t>(e.value) + shift_left<20>(e.bits & I32(~7)));
  }
#endif
  return exp_eighths<64>(at::vec::clamp_min(x, F32(-104.f)));  // keeps NaN
}

// n ln 2 + ln m + correction for x = 2^n m > 0, not subnormal, finite; ≤ 0.85 ULP.
FASTVAE_INLINE F32 log_normal(const F32& x, const F32& correction, const F32& extra_exponent) {
  const I32 bits = at::vec::cast<int32_t>(x);
  // The mantissa is taken in [√½, √2), so that ln m ≈ 0 where x ≈ 1.
  const I32 k = (bits - I32(0x3f3504f3)) >> I32(23);
  const F32 m = at::vec::cast<float>(bits - shift_left<23>(k));
  const F32 n = at::vec::convert_to_fp_of_same_size<float>(k) + extra_exponent;
  const F32 f = m - F32(1.f), f2 = f * f;
  constexpr float c[] = {0.3333331346511841f,   -0.24999988079071045f, 0.2000206857919693f,
                         -0.16669125854969025f, 0.14221230149269104f,  -0.12387536466121674f,
                         0.11859312653541565f,  -0.11768253892660141f, 0.06918381154537201f};
  F32 y = fmadd(f * f2, polynomial(f, c), correction);
  y = fmadd(n, F32(-2.12194440e-4f), y);
  y = fmadd(f2, F32(-0.5f), y);
  return fmadd(n, F32(0.693359375f), f + y);
}

// ln u for u in [2^-32, 1], as Box–Muller needs it.
FASTVAE_INLINE F32 log_unit(const F32& u) { return log_normal(u, F32(0.f), F32(0.f)); }

// ln x + correction for every x: 0 gives −∞, below 0 and NaN give NaN; ≤ 0.85 ULP.
FASTVAE_INLINE F32 log_plus(const F32& x, const F32& correction) {
  const F32 zero(0.f), infinity(std::numeric_limits<float>::infinity());
  const auto tiny =
      less(x, F32(1.17549435e-38f));  // subnormals are scaled up into the normal range
  const F32 y =
      log_normal(select(tiny, x * F32(8388608.f), x), correction, select(tiny, F32(-23.f), zero));
  const F32 below = select(less(x, zero), infinity - infinity, x);
  const F32 special = select(equal(x, zero), -infinity, below);
  return select(less(zero, x) & less(x, infinity), y, special);
}

FASTVAE_INLINE F32 log(const F32& x) { return log_plus(x, F32(0.f)); }

// ln(1 + x); the rounding of 1 + x is put back through ln(u + c) ≈ ln u + c / u; ≤ 0.85 ULP.
// `low` belongs to x, below its last place.
FASTVAE_INLINE F32 log1p(const F32& x, const F32& low) {
  const F32 u = F32(1.f) + x, c = x - (u - F32(1.f)) + low;
  const F32 correction = select(less(F32(0.f), u), c / u, F32(0.f));
  return select(equal(u, F32(1.f)), x, log_plus(u, correction));
}

FASTVAE_INLINE F32 log1p(const F32& x) { return log1p(x, F32(0.f)); }

FASTVAE_INLINE F64 exp(const F64& x) { return x.exp(); }

// The same in two halves.
struct ExpFactor64 {
  F64 half;
  friend FASTVAE_INLINE F64 operator*(const ExpFactor64& e, const F64& a) {
    return e.half * a * e.half;
  }
};

FASTVAE_INLINE ExpFactor64 exp_factor(const F64& x) {
  return {(F64(0.5) * at::vec::clamp(x, F64(-1400.0), F64(1400.0))).exp()};
}
FASTVAE_INLINE F64 exp_negative(const F64& x) { return x.exp(); }
FASTVAE_INLINE F64 log(const F64& x) { return x.log(); }
FASTVAE_INLINE F64 log1p(const F64& x) { return x.log1p(); }

FASTVAE_INLINE F32 max(const F32& a, const F32& b) { return at::vec::maximum(a, b); }
FASTVAE_INLINE F64 max(const F64& a, const F64& b) { return at::vec::maximum(a, b); }

template <class V>
struct FlooredLogs {
  V log_p, log_q;  // max(ln p, floor), max(ln(1 − p), floor)
};

template <class V>
FASTVAE_INLINE FlooredLogs<V> floored_logs(const V& p, const V& floor) {
  return {max(log(p), floor), max(log1p(-p), floor)};
}

// a / (1 + a) for a in [0, 1].
FASTVAE_INLINE F32 share(const F32& a) {
  const F32 t = F32(1.f) + a;
#if defined(CPU_CAPABILITY_AVX512)
  // A division holds a port for 16 cycles. The remainder is exact: a − q is, as q ≥ a / 2.
  const F32 r = _mm512_rcp14_ps(t), q = a * r;
  return fmadd(fnmadd(q, a, a - q), r, q);
#else
  return fnmadd(a, a / t, a);  // better than a / t, whose divisor was rounded
#endif
}
FASTVAE_INLINE F64 share(const F64& a) { return a / (F64(1.0) + a); }

// softplus(x) = ln(1 + e^x); ≤ 1.25 ULP.
FASTVAE_INLINE F32 softplus(const F32& x) {
  F32 low;
  const F32 e = exp_eighths<64>(at::vec::clamp_min(x | F32(-0.f), F32(-104.f)), &low);
  return at::vec::clamp_min(x, F32(0.f)) + log1p(e, low);
}
FASTVAE_INLINE F64 softplus(const F64& x) {
  return at::vec::clamp_min(x, F64(0.0)) + log1p(exp_negative(x | F64(-0.0)));
}

// a ≥ 0 with the sign of b.
template <class V>
FASTVAE_INLINE V with_sign(const V& a, const V& b) {
  return a | (b & num<V>(-0.0));
}

// Where the sign bit is set, for select().
template <class V>
FASTVAE_INLINE Mask<V> sign_bit(const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, F32>)
    return _mm512_movepi32_mask(_mm512_castps_si512(x));
  else
    return _mm512_movepi64_mask(_mm512_castpd_si512(x));
#elif defined(CPU_CAPABILITY_AVX2)
  return x;  // a blend looks at nothing else
#else
  return less(with_sign(num<V>(1), x), num<V>(0));
#endif
}

template <class V>
struct LogLogistic {
  V value, odds, slope;
};

// x ln σ(l) + (1 − x) ln σ(−l) = value − ln(1 + odds), and its derivative by l, x − σ(l). Nothing
// cancels at x = 0 and x = 1: each is ≤ 1.75 ULP there. One exp and one reciprocal.
template <class V>
FASTVAE_INLINE LogLogistic<V> log_logistic(const V& x, const V& l) {
  const V zero = num<V>(0), one = num<V>(1);
  const V odds = exp_negative(l | num<V>(-0.0)), small = share(odds);
  // σ(−|l|) = small; the other one is 1 − that, and the 1 goes to x.
  return {fmsub(x, l, at::vec::clamp_min(l, zero)), odds,
          select(sign_bit(l), x, x - one) + with_sign(small, l)};
}

template <class V>
struct HalfPhiExpm1 {
  V phi, expm1;  // ½ (e^d − 1 − d), ½ (e^d − 1)
};

// φ(d) = d²/2 + d³ R(d) on [−1, 1], where the difference would cancel. Elsewhere it is taken with
// what the roundings of e^d and 1 + d left over. φ ≥ 0 everywhere; ≤ 2 ULP. Halves, as the KL wants
// them, are floats where the whole is none.
FASTVAE_INLINE HalfPhiExpm1<F32> half_phi_expm1(const F32& d) {
  constexpr float c[] = {0.1666666716337204f,     0.041666675359010696f,  0.008333331905305386f,
                         0.0013888580724596977f,  0.0001984244299819693f, 2.4841781851137057e-05f,
                         2.7324401798978215e-06f, 2.607000340049126e-07f, 3.8409130098671085e-08f};
  const F32 half(0.5f), one(1.f), limit(90.f);
  const auto near = between(-one, d, one), finite = between(-limit, d, limit);
  const F32 dd = d * d, phi = fmadd(dd * d, polynomial(d, c), half * dd);
  F32 low;
  const F32 e = exp_eighths<-64, true>(at::vec::clamp(d, F32(-40.f), limit), &low);
  const F32 u = one + d, rest = select(finite, low - half * (d - (u - one)), F32(0.f));
  return {select(near, half * phi, (e - half * u) + rest),
          select(near, half * (phi + d), e - half)};
}

FASTVAE_INLINE HalfPhiExpm1<F64> half_phi_expm1(const F64& d) {
  const F64 e = d.expm1();
  // Σ d^k / k! for |d| < 0.25 (15 terms: below 1e-18).
  double factorial = 1.0;
  double c[15];
  for (int k = 2; k <= 16; ++k) c[k - 2] = 1.0 / (factorial *= k);
  F64 p(c[14]);
  for (int k = 13; k >= 0; --k) p = fmadd(p, d, F64(c[k]));
  const auto near = between(F64(-0.25), d, F64(0.25));
  return {F64(0.5) * select(near, d * d * p, e - d), F64(0.5) * e};
}

// The nearest integers, ties to even.
FASTVAE_INLINE I32 nearest(const F32& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtps_epi32(x);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtps_epi32(x);
#elif defined(__aarch64__)
  return I32(vcvtnq_s32_f32(x));
#else
  return at::vec::convert_to_int_of_same_size(x.round());
#endif
}

struct SinCos {
  F32 sin, cos;
};

// sin(πt), cos(πt) for t in [−1, 1]; absolute error about 1e-7.
FASTVAE_INLINE SinCos sincospi(const F32& t) {
  const I32 k = nearest(t + t);
  // Exact; in [−¼, ¼].
  const F32 r = fmadd(at::vec::convert_to_fp_of_same_size<float>(k), F32(-0.5f), t), r2 = r * r;
  constexpr float cs[] = {3.1415927410125732f, -5.167707920074463f, 2.5497610569000244f,
                          -0.5890122056007385f};
  constexpr float cc[] = {1.f, -4.934802055358887f, 4.058706760406494f, -1.3350359201431274f,
                          0.23126092553138733f};
  const F32 s = r * polynomial(r2, cs), c = polynomial(r2, cc);
  // A quarter turn swaps the two; then come the signs.
  const I32 sin_turn = shift_left<30>(k), cos_turn = shift_left<30>(k + I32(1));
#if defined(CPU_CAPABILITY_AVX512)
  const auto odd = _mm512_test_epi32_mask(k, _mm512_set1_epi32(1));
  const auto flip = [](const F32& v, const I32& turn) {  // v ^ (turn & sign bit)
    return F32(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v), turn,
                                                             _mm512_set1_epi32(INT32_MIN), 0x78)));
  };
#else
  const auto odd = sign_bit(at::vec::cast<float>(shift_left<31>(k)));
  const auto flip = [](const F32& v, const I32& turn) {
    return v ^ at::vec::cast<float>(turn & I32(INT32_MIN));
  };
#endif
  return {flip(select(odd, c, s), sin_turn), flip(select(odd, s, c), cos_turn)};
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
