// Count likelihoods, in nats. x is a non-negative integer, most often 0: there they are simple, and
// the loop takes the other elements together (formula.h, `rare`): counts up to 16 by a product,
// larger ones by Stirling's series, arranged so that what is large cancels before it is computed.
#pragma once

namespace fastvae {

constexpr double ln_2pi = 1.8378770664093453;

// c[0] + c[1] x + ..., by Horner's rule.
template <class V, size_t N>
FASTVAE_INLINE V series(const V& x, const double (&c)[N]) {
  V sum = num<V>(c[N - 1]);
  for (size_t i = N - 1; i-- > 0;) sum = fmadd(sum, x, num<V>(c[i]));
  return sum;
}

// What Stirling's series adds: ln Γ(z) = (z − ½) ln z − z + ½ ln 2π + log_gamma_rest, and
// ψ(z) = ln z − digamma_rest, of 1/z for z ≥ 8, and z ≥ 16 in float64.
template <class V>
FASTVAE_INLINE V log_gamma_rest(const V& inverse) {
  const V square = inverse * inverse;
  if constexpr (precise<V>)
    return inverse *
           series(square, {1. / 12, -1. / 360, 1. / 1260, -1. / 1680, 1. / 1188, -691. / 360360});
  else
    return inverse * series(square, {1. / 12, -1. / 360, 1. / 1260});
}
template <class V>
FASTVAE_INLINE V digamma_rest(const V& inverse) {
  const V square = inverse * inverse;
  V rest;
  if constexpr (precise<V>)
    rest =
        series(square, {1. / 12, -1. / 120, 1. / 252, -1. / 240, 1. / 132, -691. / 32760, 1. / 12});
  else
    rest = series(square, {1. / 12, -1. / 120, 1. / 252});
  return fmadd(square, rest, num<V>(0.5) * inverse);
}

// ln(1 + a), where the caller knows 1 + a without the cancellation.
template <class V>
FASTVAE_INLINE V log1p_of(const V& a, const V& one_plus_a) {
  const V half = num<V>(0.5);
  return select(between(-half, a, half), log1p(a), log(one_plus_a));
}

// ln x! for x in [1, 16].
template <class V>
FASTVAE_INLINE V log_factorial(const V& x) {
  static constexpr double table[16] = {0.0,
                                       0.6931471805599453,
                                       1.791759469228055,
                                       3.1780538303479458,
                                       4.787491742782046,
                                       6.579251212010101,
                                       8.525161361065415,
                                       10.60460290274525,
                                       12.801827480081469,
                                       15.104412573075516,
                                       17.502307845873887,
                                       19.987214495661885,
                                       22.552163853123425,
                                       25.19122118273868,
                                       27.89927138384089,
                                       30.671860106080672};
  return lookup16(table, x - num<V>(1));
}

// ln p(x | m) = x ln m − m − ln x!, with m = size · mean + options[0].
struct Poisson {
  static constexpr const char* name = "poisson";
  static constexpr int options = 1;
  static constexpr Input inputs[] = {{"x", Domain::count, Role::data},
                                     {"mean", Domain::nonnegative},
                                     {"size_factor", Domain::nonnegative}};
  static constexpr int rare = 3, rare_limit = 16;

  template <class V>
  static FASTVAE_INLINE V mean(const V (&in)[3], const V* opt) {
    return fmadd(in[1], in[2], opt[0]);
  }

  template <class V>
  static FASTVAE_INLINE Result<V, 3> eval(const V (&in)[3], const V* opt) {
    const V zero = num<V>(0);
    return {select(equal(in[0], zero), -mean(in, opt), zero), {zero, -in[2], -in[1]}};
  }

  template <class V, int kind>
  static FASTVAE_INLINE Result<V, 3> eval_rare(const V (&in)[3], const V* opt) {
    const V &x = in[0], m = mean(in, opt), above = x - m, slope = above / m;
    V value;
    if constexpr (kind == 0) {
      value = fmadd(x, log(m), -(m + log_factorial(x)));
    } else {
      const V inverse = num<V>(1) / x;
      value = fmadd(x, log1p_of(-above * inverse, m * inverse), above) -
              num<V>(0.5) * (log(x) + num<V>(ln_2pi)) - log_gamma_rest(inverse);
    }
    return {value, {num<V>(0), slope * in[2], slope * in[1]}};
  }
};

// ln p(x | l) = x l − e^l − ln x!, from the logarithm of the mean.
struct PoissonLog {
  static constexpr const char* name = "poisson_log";
  static constexpr int options = 0;
  static constexpr Input inputs[] = {{"x", Domain::count, Role::data}, {"log_mean"}};
  static constexpr int rare = 2, rare_limit = 16;

  template <class V>
  static FASTVAE_INLINE Result<V, 2> eval(const V (&in)[2], const V*) {
    const V zero = num<V>(0), m = exp(in[1]);
    return {select(equal(in[0], zero), -m, zero), {zero, -m}};
  }

  template <class V, int kind>
  static FASTVAE_INLINE Result<V, 2> eval_rare(const V (&in)[2], const V*) {
    const V &x = in[0], &l = in[1], m = exp(l), above = x - m;
    V value;
    if constexpr (kind == 0) {
      value = fmadd(x, l, -(m + log_factorial(x)));
    } else {
      const V log_x = log(x);
      value = fmadd(x, l - log_x, above) - num<V>(0.5) * (log_x + num<V>(ln_2pi)) -
              log_gamma_rest(num<V>(1) / x);
    }
    return {value, {num<V>(0), above}};
  }
};

// ln p(x | m, θ) = ln Γ(x + θ) − ln Γ(θ) − ln x! + θ ln(θ / (θ + m)) + x ln(m / (θ + m)), with
// m = size · mean + options[0] and the inverse dispersion θ: the variance is m + m² / θ.
struct NegativeBinomial {
  static constexpr const char* name = "negative_binomial";
  static constexpr int options = 1;
  static constexpr Input inputs[] = {{"x", Domain::count, Role::data},
                                     {"mean", Domain::nonnegative},
                                     {"dispersion", Domain::positive},
                                     {"size_factor", Domain::nonnegative}};
  static constexpr int rare = 4, rare_limit = 16;

  // x = 0: −θ ln(1 + m / θ).
  template <class V>
  static FASTVAE_INLINE Result<V, 4> eval(const V (&in)[4], const V* opt) {
    const V zero = num<V>(0), m = fmadd(in[1], in[3], opt[0]), &theta = in[2];
    const V l = log1p(m / theta), inverse = num<V>(1) / (theta + m), slope = -theta * inverse;
    return {select(equal(in[0], zero), -theta * l, zero),
            {zero, slope * in[3], fmsub(m, inverse, l), slope * in[1]}};
  }

  template <class V, int kind>
  static FASTVAE_INLINE Result<V, 4> eval_rare(const V (&in)[4], const V* opt) {
    const V one = num<V>(1), &x = in[0], m = fmadd(in[1], in[3], opt[0]), &theta = in[2];
    const V inverse = one / (theta + m), above = x - m;
    const V slope = theta * inverse * (above / m);
    const auto [value, by_theta] =
        kind == 0 ? by_product(x, m, theta, inverse) : by_series(x, m, theta, inverse, above);
    return {value, {num<V>(0), slope * in[3], by_theta, slope * in[1]}};
  }

 private:
  template <class V>
  struct Pair {
    V value, by_theta;
  };

  // Γ(x + θ) / (Γ(θ) x!) (m / (θ + m))^x = b^x Π (θ + i) / ((θ + 1) (i + 1)), i < x, with
  // b = (θ + 1) m / (θ + m): no factor is large or small. Beside the product D of the factors f
  // grows the sum of their inverses as N / D: N ← N f + D, D ← D f.
  template <class V>
  static FASTVAE_INLINE Pair<V> by_product(const V& x, const V& m, const V& theta,
                                           const V& inverse) {
    const V one = num<V>(1), shifted = theta + one, unit = one / shifted;
    V product = theta * unit, sum = one;
    for (int i = 1; any<V>(less(num<V>(i), x)) && i < rare_limit; ++i) {
      const auto more = less(num<V>(i), x);
      const V part = num<V>(1.0 / (i + 1)), factor = (theta + num<V>(i)) * (unit * part);
      sum = select(more, fmadd(sum, factor, product * part), sum);
      product = select(more, product * factor, product);
    }
    const V l = log1p(m / theta), b = shifted * inverse * m;
    return {fmadd(x, log(b), fnmadd(theta, l, log(product))),
            unit * (sum / product) + (fmsub(m, inverse, l) - x * inverse)};
  }

  // With M = θ + m, n = x + θ, d = x − m, and N = θ, or of a small θ N = θ + k, where Stirling's
  // series s holds:
  //   ln p = θ ln(n / M) + x ln(1 − θ d / (x M)) + ½ ln(N / (n x)) + s(n) − s(x) + rest(θ),
  // in which the two first logarithms cancel to first order in d.
  template <class V>
  static FASTVAE_INLINE Pair<V> by_series(const V& x, const V& m, const V& theta, const V& inverse,
                                          const V& above) {
    constexpr int k = precise<V> ? 16 : 8;
    const V zero = num<V>(0), one = num<V>(1), half = num<V>(0.5), n = x + theta;
    const V ratio = n * inverse, relative = above * inverse, inverse_x = one / x;
    const V ln_ratio = log1p_of(relative, ratio);
    const V second = log1p_of(-theta * inverse * (above * inverse_x), m * inverse_x * ratio);
    const auto small = less(theta, num<V>(k));
    const V large = select(small, theta + num<V>(k), theta), inverse_large = one / large;
    V product = theta * inverse_large, sum = one;  // of (θ + i) / N, and of their inverses
    for (int i = 1; i < k; ++i) {
      const V factor = (theta + num<V>(i)) * inverse_large;
      sum = fmadd(sum, factor, product);
      product = product * factor;
    }
    const V ln_small = select(small, log(theta * inverse_large), zero);
    const V moved = select(small, log(product) + num<V>(k), zero);
    const V inverse_n = one / n;
    const V rests = log_gamma_rest(inverse_n) - log_gamma_rest(inverse_x) -
                    log_gamma_rest(inverse_large) - num<V>(0.5 * ln_2pi);
    const V value = fmadd(theta, ln_ratio, x * second) +
                    fmadd(theta, ln_small, moved + half * log(large * inverse_n * inverse_x)) +
                    rests;
    const V by_theta = (ln_ratio - relative) + ln_small +
                       select(small, inverse_large * (sum / product), zero) +
                       (digamma_rest(inverse_large) - digamma_rest(inverse_n));
    return {value, by_theta};
  }
};

// A zero comes with odds e^z from elsewhere (Eraslan et al. 2019): with π = σ(z),
// p(x) = π [x = 0] + (1 − π) NB(x).
struct ZeroInflatedNegativeBinomial {
  static constexpr const char* name = "zero_inflated_negative_binomial";
  static constexpr int options = NegativeBinomial::options;
  static constexpr Input inputs[] = {NegativeBinomial::inputs[0],
                                     NegativeBinomial::inputs[1],
                                     NegativeBinomial::inputs[2],
                                     NegativeBinomial::inputs[3],
                                     {"zero_logits"}};
  static constexpr int rare = NegativeBinomial::rare, rare_limit = NegativeBinomial::rare_limit;
  static constexpr bool log_odds = true, log_gain = true;

  // ln p = [x = 0] ln(e^z + NB(0)) + [x > 0] ln NB(x) − ln(1 + e^z).
  template <class V>
  static FASTVAE_INLINE Result<V, 5> eval(const V (&in)[5], const V* opt) {
    const V of_nb[] = {in[0], in[1], in[2], in[3]}, &z = in[4];
    const V zero = num<V>(0), one = num<V>(1), minus = num<V>(-0.0);
    const auto nb = NegativeBinomial::eval<V>(of_nb, opt);
    const auto at_zero = equal(in[0], zero);
    // σ of z, and of z − ln NB(0): the share of such a zero that comes from elsewhere.
    const V gap = z - nb.value, odds = exp_negative(z | minus), gain = exp_negative(gap | minus);
    const V less_likely = share(odds), other = share(gain);
    const V inflated = select(sign_bit(z), less_likely, one - less_likely);
    const V elsewhere = select(sign_bit(gap), other, one - other);
    const V own = select(sign_bit(gap), one - other, other);
    return {select(at_zero, max(z, nb.value), zero) - max(z, zero),
            {zero, own * nb.grad[1], own * nb.grad[2], own * nb.grad[3],
             select(at_zero, elsewhere, zero) - inflated},
            odds,
            select(at_zero, gain, zero)};
  }

  template <class V, int kind>
  static FASTVAE_INLINE Result<V, 4> eval_rare(const V (&in)[4], const V* opt) {
    return NegativeBinomial::eval_rare<V, kind>(in, opt);
  }
};

}  // namespace fastvae
