// A formula over the elements of one tile: load, evaluate, mask, sum, store.
#pragma once

#include "../math/compounds.h"

#include "../formulas/all.h"
#include "domain.h"
#include "sums.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// Bit j: what `test` says of input j. Read at compile time only, so that no instruction set's
// object holds a copy of F::inputs that the linker could give to the others.
template <class F, class Test>
consteval unsigned inputs_that(Test test) {
  unsigned bits = 0;
  for (int j = 0; j < inputs_of<F>; ++j) bits |= (test(F::inputs[j]) ? 1u : 0u) << j;
  return bits;
}

// Where a tile's inputs and wanted gradients are; others are null. The first parameter is param[1],
// as in a formula's list of inputs.
template <class F, class T, class X, class S>
struct Pointers {
  const X* x;
  X* dx;
  const S* param[inputs_of<F>];
  S* dparam[inputs_of<F>];
  const T* mask;
  // Of short rows: each element's scale, and where its value goes.
  const T* factor;
  T* value;
};

// Calls body(j, constant) for each input, the latter its domain.
template <class F, class Body>
FASTVAE_INLINE void for_domains(Body&& body) {
  [&]<int... j>(std::integer_sequence<int, j...>) __attribute__((always_inline)) {
    (body(j, std::integral_constant<Domain, F::inputs[j].domain>{}), ...);
  }(std::make_integer_sequence<int, inputs_of<F>>{});
}

// Whether all n values are in the domain, of indices below `limit`, those apart that the mask
// leaves out.
template <Domain domain, class T, class S>
inline bool all_in_domain(const S* x, int64_t n, const T* mask, int64_t limit = 0) {
  for (int64_t i = 0; i < n; ++i) {
    const T v = static_cast<T>(x[i]);
    const bool inside =
        domain == Domain::real       ? true
        : domain == Domain::unit     ? v >= T(0) && v <= T(1)
        : domain == Domain::positive ? v > T(0)
        : domain == Domain::count    ? v >= T(0) && v - v == T(0) && std::nearbyint(v) == v
        : domain == Domain::index ? v >= T(0) && v < static_cast<T>(limit) && std::nearbyint(v) == v
                                  : v >= T(0);
    if (!inside && !(mask && mask[i] == T(0))) return false;
  }
  return true;
}

// One tile: returns Σ value, or of short rows stores the values; writes scale · gradient where that
// is wanted; flags inputs outside their domain. Behind a partial vector, and where the mask leaves
// an element out, stands what lies in every domain; what it adds to the sum is cut off.
template <class F, class T, class X, class S, bool Grad, bool Masked, bool Short>
inline double formula_tile(const Pointers<F, T, X, S>& t, int64_t n, const Vec<T>* options, T scale,
                           int64_t ahead, unsigned& outside) {
  using V = Vec<T>;
  constexpr int N = inputs_of<F>, P = parts<T, S>;
  constexpr bool may_mask = Masked || Short;
  constexpr bool odds_too = requires { F::log_odds; }, gain_too = requires { F::log_gain; };
  constexpr unsigned at_one = inputs_that<F>([](Input i) { return i.domain == Domain::positive; });
  const V zero(T(0)), one(T(1)), factor(scale);
  std::tuple<Inside<V, Domain::real>, Inside<V, Domain::unit>, Inside<V, Domain::nonnegative>,
             Inside<V, Domain::positive>, Inside<V, Domain::count>>
      inside[N];
  const Pointers<F, T, X, S> here = t;  // a copy: a store of floats could change what `t` refers to

  const double total =
      sum_vectors<T, S>(n, [&](int64_t i, auto count, Sum<T>& sum) __attribute__((always_inline)) {
        constexpr bool partial = std::is_same_v<decltype(count), int64_t>;
        V in[N][P], grad[N][P];
        load(here.x + i, count, in[0]);
        for (int j = 1; j < N; ++j) load(here.param[j] + i, count, in[j]);
        __builtin_prefetch(here.x + i + ahead, 0, 2);
        for (int j = 1; j < N; ++j) __builtin_prefetch(here.param[j] + i + ahead, 0, 2);
        Mask<V> drop{};
        const bool masked = Masked || (Short && here.mask);
        if constexpr (may_mask)
          if (masked) drop = equal(V::loadu(here.mask + i, count), zero);
        for (int p = 0; p < P; ++p) {
          V v[N];
          for (int j = 0; j < N; ++j) {
            const V filler = at_one >> j & 1 ? one : zero;
            v[j] = in[j][p];
            if constexpr (partial && at_one != 0) v[j] = V::set(filler, v[j], in_part<P>(count, p));
            // Before the formula for the domain's sake, after it for the value's.
            if constexpr (may_mask)
              if (masked) v[j] = select(drop, filler, v[j]);
          }
          for_domains<F>([&](int j, auto domain) __attribute__((always_inline)) {
            std::get<Inside<V, decltype(domain)::value>>(inside[j]).add(v[j]);
          });
          const auto r = F::template eval<V>(v, options);
          for (int j = 0; j < N; ++j) grad[j][p] = r.grad[j];
          V value = r.value, odds = r.odds, gain = r.gain;
          if constexpr (Short) {
            if constexpr (odds_too) value = value - log1p(odds);
            if constexpr (gain_too) value = value + log1p(gain);
            if (masked) value = select(drop, zero, value);
            value.store(here.value + i, count);
            continue;
          }
          const auto keep = [&](V& term) __attribute__((always_inline)) {
            if constexpr (Masked) term = select(drop, zero, term);
            if constexpr (partial) term = V::set(zero, term, in_part<P>(count, p));
          };
          keep(value);
          sum.add(value);
          if constexpr (odds_too) keep(odds), sum.subtract_log1p(odds);
          if constexpr (gain_too) keep(gain), sum.add_log1p(gain);
        }
        for (int j = 0; Grad && j < N; ++j) {
          if (!(j == 0 ? static_cast<const void*>(here.dx) : here.dparam[j])) continue;
          for (V& v : grad[j]) {
            if constexpr (Short) {
              const V f = V::loadu(here.factor + i, count);
              v = select(equal(f, zero), zero, f * v);  // not 0 · ∞: β may be 0, the KL infinite
            } else {
              v = factor * v;
            }
            if constexpr (may_mask)
              if (masked) v = select(drop, zero, v);
          }
          j == 0 ? store(grad[j], here.dx + i, count) : store(grad[j], here.dparam[j] + i, count);
        }
      });

  for_domains<F>([&](int j, auto domain) {
    constexpr Domain d = decltype(domain)::value;
    if (!std::get<Inside<V, d>>(inside[j]).all() &&
        !(j == 0 ? all_in_domain<d>(t.x, n, t.mask) : all_in_domain<d>(t.param[j], n, t.mask)))
      outside |= 1u << j;
  });
  return total;
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
