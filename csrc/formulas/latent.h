// The latent side: reparameterized sampling and the KL divergence between diagonal Gaussians, in
// nats.
#pragma once

namespace fastvae {

// KL(N(μ, e^lv) ‖ N(0, 1)) = ½ (μ² + φ(lv)), φ(lv) = expm1(lv) − lv  (Kingma & Welling 2014,
// appendix B).
struct StandardKL {
  static constexpr const char* name = "standard_kl";
  static constexpr int options = 0;
  static constexpr Input inputs[] = {{"mu"}, {"logvar"}};

  template <class V>
  static FASTVAE_INLINE Result<V, 2> eval(const V (&in)[2], const V*) {
    const V& mu = in[0];
    const auto half = half_phi_expm1(in[1]);
    return {num<V>(0.5) * mu * mu + half.phi, {mu, half.expm1}};
  }
};

// KL(N(μ, e^lv) ‖ N(μp, e^lvp)) = ½ (φ(lv − lvp) + (μ − μp)² e^−lvp), the distance scaled before it
// is squared.
struct NormalKL {
  static constexpr const char* name = "normal_kl";
  static constexpr int options = 0;
  static constexpr Input inputs[] = {{"mu"}, {"logvar"}, {"prior mu"}, {"prior logvar"}};

  template <class V>
  static FASTVAE_INLINE Result<V, 4> eval(const V (&in)[4], const V*) {
    const auto precision = exp_factor(num<V>(-0.5) * in[3]);  // 1/σp
    const V u = precision * (in[0] - in[2]), g = precision * u, distance = num<V>(0.5) * u * u;
    const auto half = half_phi_expm1(in[1] - in[3]);
    return {half.phi + distance, {g, half.expm1, -g, -(half.expm1 + distance)}};
  }
};

// z = μ + σ ε, σ = e^(lv/2).
template <class V>
FASTVAE_INLINE V sample(const V& mu, const V& logvar, const V& eps) {
  return mu + exp_factor(num<V>(0.5) * logvar) * eps;
}

// dlogvar of the sample, given Σ ε·dz over the samples drawn: ½ σ Σ ε dz  (dμ is Σ dz).
template <class V>
FASTVAE_INLINE V sample_dlogvar(const V& logvar, const V& eps_dz) {
  const V half = num<V>(0.5);
  return half * (exp_factor(half * logvar) * eps_dz);
}

}  // namespace fastvae
