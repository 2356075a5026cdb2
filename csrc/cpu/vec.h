// The SIMD vocabulary: the functions that formulas call, on at::vec::Vectorized.
//
// float: own polynomials (minimax, fitted in 60 digits), one exp and one division per logistic.
// double: the vector maths that torch ships (Sleef, 1 ULP).
// A bound in ULP is what tests/test_vec.py measures against float64, over the float32 bit patterns;
// one without is not measured by itself, only through the functions that use it.
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
#else
template <class V>
using Mask = V;
#define FASTVAE_COMPARE(name, op, OP)                                    \
  FASTVAE_INLINE F32 name(const F32& a, const F32& b) { return a op b; } \
  FASTVAE_INLINE F64 name(const F64& a, const F64& b) { return a op b; }
template <class V>
FASTVAE_INLINE V select(const V& m, const V& yes, const V& no) {
  return V::blendv(no, yes, m);
}
template <class V>
FASTVAE_INLINE bool all(const Mask<V>& m) {
  return m.zero_mask() == 0;
}
#endif
FASTVAE_COMPARE(less, <, _CMP_LT_OQ)
FASTVAE_COMPARE(less_equal, <=, _CMP_LE_OQ)
FASTVAE_COMPARE(equal, ==, _CMP_EQ_OQ)
#undef FASTVAE_COMPARE

template <class V>
FASTVAE_INLINE Mask<V> between(const V& low, const V& x, const V& high) {
  return less_equal(low, x) & less_equal(x, high);
}

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

// p · 2^n for an integral n in [−150, 129]; overflows to ∞ and rounds into the subnormals.
FASTVAE_INLINE F32 scale2(const F32& p, const F32& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  const I32 i = at::vec::convert_to_int_of_same_size(n);  // in two factors: 2^±150 is no float
  const I32 half = i >> I32(1), bias(127), mantissa(23);
  return p * at::vec::cast<float>((half + bias) << mantissa) *
         at::vec::cast<float>((i - half + bias) << mantissa);
#endif
}

// e^x for x in [−104, 89] or NaN.
FASTVAE_INLINE F32 exp_clamped(const F32& x) {
  const F32 n = (x * F32(1.44269504f)).round();
  F32 r = fmadd(n, F32(-0.693359375f), x);  // ln 2 in two parts; n times the first is exact
  r = fmadd(n, F32(2.12194440e-4f), r);
  constexpr float c[] = {0.49999991059303284f, 0.16666419804096222f, 0.041668232530355453f,
                         0.008374898694455624f, 0.0013836740981787443f};
  return scale2(F32(1.f) + fmadd(r * r, polynomial(r, c), r), n);
}

// e^x for every x, and for x ≤ 0; at::vec's clamps keep NaN.
FASTVAE_INLINE F32 exp(const F32& x) {
  return exp_clamped(at::vec::clamp(x, F32(-104.f), F32(89.f)));
}
FASTVAE_INLINE F32 exp_negative(const F32& x) {
  return exp_clamped(at::vec::clamp_min(x, F32(-104.f)));
}

// ln(1 + e) for e in [0, 1], as e + e² Q(e): the rounding of Q hardly counts.
FASTVAE_INLINE F32 log1p_unit(const F32& e) {
  constexpr float c[] = {-0.4999998211860657f,  0.33332559466362f,     -0.24987271428108215f,
                         0.19890747964382172f,  -0.16105692088603973f, 0.12418434768915176f,
                         -0.08244172483682632f, 0.041478194296360016f, -0.0134075116366148f,
                         0.0020302373450249434f};
  return fmadd(e * e, polynomial(e, c), e);
}

// n ln 2 + ln m + correction for x = 2^n m > 0, not subnormal, finite; ≤ 0.8 ULP.
FASTVAE_INLINE F32 log_normal(const F32& x, const F32& correction, const F32& extra_exponent) {
  const I32 bits = at::vec::cast<int32_t>(x);
  // The mantissa is taken in [√½, √2), so that ln m ≈ 0 where x ≈ 1.
  const I32 k = (bits - I32(0x3f3504f3)) >> I32(23);
  const F32 m = at::vec::cast<float>(bits - (k << I32(23)));
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

// ln x + correction for every x: 0 gives −∞, below 0 and NaN give NaN; ≤ 0.8 ULP.
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

// ln(1 + x); the rounding of 1 + x is put back through ln(u + c) ≈ ln u + c / u; ≤ 0.8 ULP.
FASTVAE_INLINE F32 log1p(const F32& x) {
  const F32 u = F32(1.f) + x, c = x - (u - F32(1.f));
  const F32 correction = select(less(F32(0.f), u), c / u, F32(0.f));
  return select(equal(u, F32(1.f)), x, log_plus(u, correction));
}

FASTVAE_INLINE F64 exp(const F64& x) { return x.exp(); }
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

template <class V>
struct Logistic {
  V log_p, log_q, p, q;  // ln σ(l), ln σ(−l), σ(l), σ(−l)
};

FASTVAE_INLINE F64 log1p_unit(const F64& e) { return e.log1p(); }

// One exp and one division for all four; ≤ 2.5 ULP each (2.0 the logarithms, 2.35 σ, with FMA).
template <class V>
FASTVAE_INLINE Logistic<V> logistic(const V& l) {
  const V zero = num<V>(0), one = num<V>(1);
  const auto positive = less_equal(zero, l);
  const V e = exp_negative(l | num<V>(-0.0));  // −|l|
  const V tail = log1p_unit(e), big = one / (one + e), small = e * big;
  return {at::vec::clamp_max(l, zero) - tail, -at::vec::clamp_min(l, zero) - tail,
          select(positive, big, small), select(positive, small, big)};
}

template <class V>
struct PhiExpm1 {
  V phi, expm1;  // e^d − 1 − d, e^d − 1
};

// φ(d) = d²/2 + d³ R(d) on [−1, 2], where the difference would cancel; φ ≥ 0 everywhere; ≤ 2.5 ULP.
FASTVAE_INLINE PhiExpm1<F32> phi_expm1(const F32& d) {
  constexpr float c[] = {0.1666666716337204f,     0.041666675359010696f,  0.008333331905305386f,
                         0.0013888580724596977f,  0.0001984244299819693f, 2.4841781851137057e-05f,
                         2.7324401798978215e-06f, 2.607000340049126e-07f, 3.8409130098671085e-08f};
  const auto near = between(F32(-1.f), d, F32(2.f));
  const F32 dd = d * d, phi = fmadd(dd * d, polynomial(d, c), F32(0.5f) * dd);
  const F32 e = exp(d) - F32(1.f);
  return {select(near, phi, e - d), select(near, phi + d, e)};
}

FASTVAE_INLINE PhiExpm1<F64> phi_expm1(const F64& d) {
  const F64 e = d.expm1();
  // Σ d^k / k! for |d| < 0.25 (15 terms: below 1e-18).
  double factorial = 1.0;
  double c[15];
  for (int k = 2; k <= 16; ++k) c[k - 2] = 1.0 / (factorial *= k);
  F64 p(c[14]);
  for (int k = 13; k >= 0; --k) p = fmadd(p, d, F64(c[k]));
  const auto near = between(F64(-0.25), d, F64(0.25));
  return {select(near, d * d * p, e - d), e};
}

struct SinCos {
  F32 sin, cos;
};

// sin(πt), cos(πt) for t in [−1, 1]; absolute error about 1e-7.
FASTVAE_INLINE SinCos sincospi(const F32& t) {
  const F32 q = (t + t).round();
  const F32 r = fmadd(q, F32(-0.5f), t), r2 = r * r;  // exact; in [−¼, ¼]
  constexpr float cs[] = {3.1415927410125732f, -5.167707920074463f, 2.5497610569000244f,
                          -0.5890122056007385f};
  constexpr float cc[] = {1.f, -4.934802055358887f, 4.058706760406494f, -1.3350359201431274f,
                          0.23126092553138733f};
  const F32 s = r * polynomial(r2, cs), c = polynomial(r2, cc);
  const I32 k = at::vec::convert_to_int_of_same_size(q);
  // A quarter turn swaps the two.
  const auto odd = less(F32(0.f), at::vec::convert_to_fp_of_same_size<float>(k & I32(1)));
  const I32 sin_sign = (k & I32(2)) << I32(30), cos_sign = ((k + I32(1)) & I32(2)) << I32(30);
  return {select(odd, c, s) ^ at::vec::cast<float>(sin_sign),
          select(odd, s, c) ^ at::vec::cast<float>(cos_sign)};
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
