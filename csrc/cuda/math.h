// The formulas' vocabulary for one float or double: what a CUDA kernel instantiates them with.
// Host-callable too, so that the formulas can be compiled and checked without a GPU.
#pragma once

#include <cmath>

#include "../formulas/formula.h"

namespace fastvae {

template <class V>
FASTVAE_INLINE V num(double v) {
  return static_cast<V>(v);
}

template <class V>
struct LogLogistic {
  V value, odds, slope;
};

template <class V>
struct FlooredLogs {
  V log_p, log_q;  // max(ln p, floor), max(ln(1 − p), floor)
};

template <class V>
struct HalfPhiExpm1 {
  V phi, expm1;  // ½ (e^d − 1 − d), ½ (e^d − 1)
};

// e^x as a factor, in two parts: it need not be a number itself where its product is one.
template <class V>
struct ExpFactor {
  V half;
  friend FASTVAE_INLINE V operator*(const ExpFactor& e, V a) { return e.half * a * e.half; }
};

#define FASTVAE_SCALAR_MATH(V)                                                             \
  FASTVAE_INLINE V exp(V x) { return ::exp(x); }                                           \
  FASTVAE_INLINE ExpFactor<V> exp_factor(V x) {                                            \
    const V limit = sizeof(V) == 4 ? V(174) : V(1400), h = V(0.5);                         \
    return {::exp(h * (x < -limit ? -limit : x > limit ? limit : x))};                     \
  }                                                                                        \
  FASTVAE_INLINE V max(V a, V b) { return a >= b || a != a ? a : b; }                      \
  FASTVAE_INLINE FlooredLogs<V> floored_logs(V p, V floor) {                               \
    return {max(::log(p), floor), max(::log1p(-p), floor)};                                \
  }                                                                                        \
  /* x ln σ(l) + (1 − x) ln σ(−l) = value − ln(1 + odds), and its derivative by l. */      \
  FASTVAE_INLINE LogLogistic<V> log_logistic(V x, V l) {                                   \
    const V odds = ::exp(-::fabs(l)), small = odds / (V(1) + odds);                        \
    const bool negative = l < V(0);                                                        \
    return {::fma(x, l, -::fmax(l, V(0))), odds, negative ? x - small : x - V(1) + small}; \
  }                                                                                        \
  FASTVAE_INLINE HalfPhiExpm1<V> half_phi_expm1(V d) {                                     \
    const V e = ::expm1(d);                                                                \
    if (::fabs(d) > V(0.25)) return {V(0.5) * (e - d), V(0.5) * e};                        \
    /* Σ d^k / k!, k = 2…12: the direct difference cancels. */                             \
    V s = V(1.0 / 479001600.0);                                                            \
    s = s * d + V(1.0 / 39916800.0);                                                       \
    s = s * d + V(1.0 / 3628800.0);                                                        \
    s = s * d + V(1.0 / 362880.0);                                                         \
    s = s * d + V(1.0 / 40320.0);                                                          \
    s = s * d + V(1.0 / 5040.0);                                                           \
    s = s * d + V(1.0 / 720.0);                                                            \
    s = s * d + V(1.0 / 120.0);                                                            \
    s = s * d + V(1.0 / 24.0);                                                             \
    s = s * d + V(1.0 / 6.0);                                                              \
    s = s * d + V(0.5);                                                                    \
    return {V(0.5) * s * d * d, V(0.5) * e};                                               \
  }
FASTVAE_SCALAR_MATH(float)
FASTVAE_SCALAR_MATH(double)
#undef FASTVAE_SCALAR_MATH

}  // namespace fastvae
