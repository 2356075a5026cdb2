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
struct Logistic {
  V log_p, log_q, p, q;  // ln σ(l), ln σ(−l), σ(l), σ(−l)
};

template <class V>
struct FlooredLogs {
  V log_p, log_q;  // max(ln p, floor), max(ln(1 − p), floor)
};

template <class V>
struct PhiExpm1 {
  V phi, expm1;  // e^d − 1 − d, e^d − 1
};

#define FASTVAE_SCALAR_MATH(V)                                                                \
  FASTVAE_INLINE V exp(V x) { return ::exp(x); }                                              \
  FASTVAE_INLINE V max(V a, V b) { return a >= b || a != a ? a : b; }                         \
  FASTVAE_INLINE FlooredLogs<V> floored_logs(V p, V floor) {                                  \
    return {max(::log(p), floor), max(::log1p(-p), floor)};                                   \
  }                                                                                           \
  FASTVAE_INLINE Logistic<V> logistic(V l) {                                                  \
    const V e = ::exp(-::fabs(l)), t = ::log1p(e), big = V(1) / (V(1) + e);                   \
    const V small = e * big;                                                                  \
    const bool pos = l >= V(0);                                                               \
    return {::fmin(l, V(0)) - t, -::fmax(l, V(0)) - t, pos ? big : small, pos ? small : big}; \
  }                                                                                           \
  FASTVAE_INLINE PhiExpm1<V> phi_expm1(V d) {                                                 \
    const V e = ::expm1(d);                                                                   \
    if (::fabs(d) > V(0.25)) return {e - d, e};                                               \
    /* Σ d^k / k!, k = 2…12: the direct difference cancels. */                                \
    V s = V(1.0 / 479001600.0);                                                               \
    s = s * d + V(1.0 / 39916800.0);                                                          \
    s = s * d + V(1.0 / 3628800.0);                                                           \
    s = s * d + V(1.0 / 362880.0);                                                            \
    s = s * d + V(1.0 / 40320.0);                                                             \
    s = s * d + V(1.0 / 5040.0);                                                              \
    s = s * d + V(1.0 / 720.0);                                                               \
    s = s * d + V(1.0 / 120.0);                                                               \
    s = s * d + V(1.0 / 24.0);                                                                \
    s = s * d + V(1.0 / 6.0);                                                                 \
    s = s * d + V(0.5);                                                                       \
    return {s * d * d, e};                                                                    \
  }
FASTVAE_SCALAR_MATH(float)
FASTVAE_SCALAR_MATH(double)
#undef FASTVAE_SCALAR_MATH

}  // namespace fastvae
