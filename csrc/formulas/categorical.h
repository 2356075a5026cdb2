// The categorical log-likelihood, in nats; x is the index of a class.
#pragma once

namespace fastvae {

// ln p(x | l) = l_x − ln Σ_c e^l_c, and with ε = options[0] (label smoothing, Szegedy et al. 2016)
// (1 − ε) times that plus ε times its mean over all classes.
struct Categorical {
  static constexpr const char* name = "categorical";
  static constexpr int options = 1;
  static constexpr Input inputs[] = {{"x", Domain::index, Role::data},
                                     {"logits", Domain::real, Role::parameter, 0}};
  static constexpr bool across_planes = true;

  // Relative to the largest logit, and with the others' share of the sum kept apart from x's own:
  // nothing cancels where x is nearly certain.
  template <class S>
  static FASTVAE_INLINE auto eval(const S& s) {
    using V = typename S::V;
    const V zero = num<V>(0), one = num<V>(1), minus = num<V>(-0.0);
    const V x = s.in(0, 0), smoothing = s.option(0);
    const bool smooths = any<V>(less(zero, smoothing));
    const int64_t classes = s.planes(1);
    V most = s.in(1, 0);
    for (int64_t c = 1; c < classes; ++c) most = max(most, s.in(1, c));
    most = s.largest(most);

    LongSum<V> others(zero), all(zero);
    V chosen = zero, own = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const V l = s.in(1, c) - most, e = exp_negative(l | minus);
      const auto is_x = equal(x, s.index(c));
      chosen = select(is_x, l, chosen);
      own = select(is_x, e, own);
      others.add(select(is_x, zero, s.real(c, e)));
      if (smooths) all.add(s.real(c, l));
      s.keep(1, c, e);
    }
    chosen = s.sum(chosen);
    own = s.sum(own);
    const V rest = s.sum(others.total()), inverse = one / (rest + own);
    const V each = num<V>(1.0 / static_cast<double>(s.count(1)));
    // A logit may be −∞: 0 · ∞ where nothing is smoothed.
    const V smoothed =
        select(equal(smoothing, zero), zero, smoothing * (each * s.sum(all.total()) - chosen));
    if (s.wants(1)) {
      const V floor = smoothing * each;
      for (int64_t c = 0; c < classes; ++c) {
        const V p =
            inverse * s.kept(1, c, [&] { return exp_negative((s.in(1, c) - most) | minus); });
        const auto is_x = equal(x, s.index(c));
        s.grad(1, c, floor + select(is_x, rest * inverse - smoothing, -p));
      }
    }
    return chosen + smoothed - log1p(rest + (own - one));
  }
};

}  // namespace fastvae
