// Bernoulli log-likelihoods, in nats; targets x may be anywhere in [0, 1].
#pragma once

namespace fastvae {

// ln p(x | l) = x ln σ(l) + (1 − x) ln σ(−l).  No term cancels at x = 0 or x = 1, for any logit.
struct Bernoulli {
  static constexpr const char* name = "bernoulli";
  static constexpr int options = 0;
  static constexpr Input inputs[] = {{"x", Domain::unit}, {"logits"}};
  static constexpr bool log_odds = true;

  template <class V>
  static FASTVAE_INLINE Result<V, 2> eval(const V (&in)[2], const V*) {
    const auto s = log_logistic(in[0], in[1]);
    return {s.value, {in[1], s.slope}, s.odds};
  }
};

// ln p(x | p) = x max(ln p, m) + (1 − x) max(ln(1 − p), m), with m = options[0].
// The clamp and the floor of 1e-12 under the gradient are those of torch.nn.BCELoss (m = −100
// there).
struct BernoulliProbs {
  static constexpr const char* name = "bernoulli_probs";
  static constexpr int options = 1;
  static constexpr Input inputs[] = {{"x", Domain::unit}, {"probs", Domain::unit}};

  template <class V>
  static FASTVAE_INLINE Result<V, 2> eval(const V (&in)[2], const V* opt) {
    const V &x = in[0], &p = in[1];
    const V one = num<V>(1);
    const auto s = floored_logs(p, opt[0]);
    const V variance = max(p * (one - p), num<V>(1e-12));
    return {x * s.log_p + (one - x) * s.log_q, {s.log_p - s.log_q, (x - p) / variance}};
  }
};

}  // namespace fastvae
