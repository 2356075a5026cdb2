// exp, log, log1p, sin and cos of lanes.
//
// float: own polynomials (minimax, fitted in 60 digits). double: the vector maths that torch ships
// (Sleef, 1 ULP). A bound in ULP is what tests/ulp.cpp measures against float64 over the float32
// bit patterns.
#pragma once

#if defined(__CUDACC__)
#include "../cuda/lanes.h"
#else
#include "../cpu/lanes.h"
#endif

namespace fastvae {
inline namespace CPU_CAPABILITY {

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
  const I32 i = to_ints(n);
  const I32 half = i >> I32(1), bias(127), mantissa(23);  // in two factors: 2^±150 is no float
  return p * as_floats((half + bias) << mantissa) * as_floats((i - half + bias) << mantissa);
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

// Gives p and n; `low`: what the rounding of p left over.
FASTVAE_INLINE F32 exp_mantissa(const F32& x, F32& n, F32* low = nullptr) {
  n = (x * F32(1.44269504f)).round();
  constexpr float c[] = {0.49999991059303284f, 0.16666419804096222f, 0.041668232530355453f,
                         0.008374898694455624f, 0.0013836740981787443f};
  const F32 one(1.f);
  // ln 2 in two parts; n times the first is exact.
#if defined(FASTVAE_GENERIC)
  // Without an fma what the roundings of r and 1 + r left over would show.
  const F32 high = x - n * F32(0x1.62e4p-1f), rest = n * F32(1.42860677e-6f), r = high - rest;
  const F32 u = one + r, tail = r * r * polynomial(r, c) + (((high - r) - rest) + (r - (u - one)));
  const F32 p = u + tail;
  if (low) *low = tail - (p - u);
#else
  const F32 r = fmadd(n, F32(2.12194440e-4f), fmadd(n, F32(-0.693359375f), x));
  const F32 beyond_one = fmadd(r * r, polynomial(r, c), r), p = one + beyond_one;
  if (low) *low = beyond_one - (p - one);
#endif
  return p;
}

FASTVAE_INLINE ExpFactor32 exp_unclamped(const F32& x) {
  ExpFactor32 e;
  e.p = exp_mantissa(x, e.n);
  return e;
}

// e^x as a factor, for every x: beyond ±174 every product with a float but 0 is 0 or ∞ even when
// squared. the clamps keep NaN.
FASTVAE_INLINE ExpFactor32 exp_factor(const F32& x) {
  return exp_unclamped(clamp(x, F32(-174.f), F32(174.f)));
}

// e^x for every x; ≤ 1.2 ULP.
FASTVAE_INLINE F32 exp(const F32& x) {
  const ExpFactor32 e = exp_unclamped(clamp(x, F32(-104.f), F32(89.f)));
  return scale2(e.p, e.n);
}

#if defined(__CUDACC__) || defined(FASTVAE_GENERIC)
// e^x, or half of it, for x in [−104, 90] or NaN. `low`: what the rounding left over. A table, as
// below, would lie in memory.
template <int, bool half = false>
FASTVAE_INLINE F32 exp_eighths(const F32& x, F32* low = nullptr) {
  F32 n;
  const F32 p = exp_mantissa(x, n, low);
  if (half) n = n - F32(1.f);
  if (low) *low = scale2(*low, n);
  return scale2(p, n);
}
#else
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
  const I32 bits = as_ints(shifted);
  const F32 t = lookup8(head, bits), t_tail = lookup8(tail, bits);
  // x − n ln 2 is exact in one fma; what ln 2 lacks is added to r late, beside the polynomial.
  const F32 r = fmadd(n, F32(-0.693147182f), x);
  const F32 fine = r + fmadd(n, F32(1.90465430e-9f), t_tail);
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
  const F32 power = as_floats(shift_left<23>((e.bits >> I32(3)) + I32(127 + up - magic_eighths)));
  const F32 back((up > 0 ? 0x1p-64f : 0x1p64f) * (half ? 0.5f : 1.f));
  if (low) *low = e.low * power * back;
  return e.value * power * back;
#endif
}
#endif  // CUDA

// e^x for x ≤ 0, its sign bit set, in fewer steps than exp; ≤ 0.8 ULP.
FASTVAE_INLINE F32 exp_negative(const F32& x) {
#if defined(CPU_CAPABILITY_AVX2)
  // n is added to the exponent where that stays normal, 5 cycles sooner than two multiplications.
  const __m256i limit = _mm256_castps_si256(F32(-87.f));  // as integers: NaN lies beyond it too
  const __m256i far = _mm256_cmpgt_epi32(_mm256_castps_si256(x), limit);
  if (__builtin_expect(_mm256_movemask_ps(_mm256_castsi256_ps(far)) == 0, 1)) {
    const Eighths e = exp_parts(x);
    return as_floats(as_ints(e.value) + shift_left<20>(e.bits & I32(~7)));
  }
#endif
  return exp_eighths<64>(clamp_min(x, F32(-104.f)));  // keeps NaN
}

// n ln 2 + ln m + correction for x = 2^n m > 0, not subnormal, finite; ≤ 0.85 ULP.
FASTVAE_INLINE F32 log_normal(const F32& x, const F32& correction, const F32& extra_exponent) {
  const I32 bits = as_ints(x);
  // The mantissa is taken in [√½, √2), so that ln m ≈ 0 where x ≈ 1.
  const I32 k = (bits - I32(0x3f3504f3)) >> I32(23);
  const F32 m = as_floats(bits - shift_left<23>(k));
  const F32 n = to_floats(k) + extra_exponent;
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
FASTVAE_INLINE F32 log1p(const F32& x) {
  const F32 u = F32(1.f) + x, c = x - (u - F32(1.f));
  const F32 correction = select(less(F32(0.f), u), c / u, F32(0.f));
  return select(equal(u, F32(1.f)), x, log_plus(u, correction));
}

FASTVAE_INLINE F64 exp(const F64& x) { return x.exp(); }

// The same in two halves.
struct ExpFactor64 {
  F64 half;
  friend FASTVAE_INLINE F64 operator*(const ExpFactor64& e, const F64& a) {
    return e.half * a * e.half;
  }
};

FASTVAE_INLINE ExpFactor64 exp_factor(const F64& x) {
  return {(F64(0.5) * clamp(x, F64(-1400.0), F64(1400.0))).exp()};
}
FASTVAE_INLINE F64 exp_negative(const F64& x) { return x.exp(); }
FASTVAE_INLINE F64 log(const F64& x) { return x.log(); }
FASTVAE_INLINE F64 log1p(const F64& x) { return x.log1p(); }

struct SinCos {
  F32 sin, cos;
};

// sin(πt), cos(πt) for t in [−1, 1]; absolute error about 1e-7.
FASTVAE_INLINE SinCos sincospi(const F32& t) {
  const I32 k = nearest(t + t);
  // Exact; in [−¼, ¼].
  const F32 r = fmadd(to_floats(k), F32(-0.5f), t), r2 = r * r;
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
  const auto odd = sign_bit(as_floats(shift_left<31>(k)));
  const auto flip = [](const F32& v, const I32& turn) {
    return v ^ as_floats(turn & I32(INT32_MIN));
  };
#endif
  return {flip(select(odd, c, s), sin_turn), flip(select(odd, s, c), cos_turn)};
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
