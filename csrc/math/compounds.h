// What formulas call that would cancel, overflow or cost more if put together from math.h: one exp
// and one division per logistic.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

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
  return {fmsub(x, l, clamp_min(l, zero)), odds,
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
  const F32 e = exp_eighths<-64, true>(clamp(d, F32(-40.f), limit), &low);
  const F32 u = one + d, rest = select(finite, low - half * (d - (u - one)), F32(0.f));
  return {select(near, half * phi, (e - half * u) + rest),
          select(near, half * (phi + d), (e - half) + low)};
}

// On [−½, ½] φ(d) = Σ d^k / k! from k = 2 on (15 terms: below 1e-18).
FASTVAE_INLINE HalfPhiExpm1<F64> half_phi_expm1(const F64& d) {
  double factorial = 1.0;
  double c[15];
  for (int k = 2; k <= 16; ++k) c[k - 2] = 1.0 / (factorial *= k);
  F64 p(c[14]);
  for (int k = 13; k >= 0; --k) p = fmadd(p, d, F64(c[k]));
  const F64 half(0.5), phi = d * d * p, expm1 = exp(d) - F64(1.0);
  const auto near = between(-half, d, half);
  return {half * select(near, phi, expm1 - d), half * select(near, phi + d, expm1)};
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
