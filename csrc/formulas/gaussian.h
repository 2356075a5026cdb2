// Gaussian log-likelihoods, in nats.
#pragma once

namespace fastvae {

// ln p(x | m) = c − ½ w (x − m)², with w = options[0] = 1/scale² and c = options[1].
struct Gaussian {
  static constexpr const char* name = "gaussian";
  static constexpr int options = 2;
  static constexpr Input inputs[] = {{"x"}, {"mean"}};

  template <class V>
  static FASTVAE_INLINE Result<V, 2> eval(const V (&in)[2], const V* opt) {
    const V d = in[0] - in[1], wd = opt[0] * d;
    return {opt[1] - num<V>(0.5) * wd * d, {-wd, wd}};
  }
};

// ln p(x | m, lv) = −½ (lv + (x − m)² e^−lv) + c, with c = options[0]. The residual is scaled
// before it is squared: (x − m)² e^−lv is 0 · ∞ long before the answer is infinite.
struct GaussianLogvar {
  static constexpr const char* name = "gaussian_logvar";
  static constexpr int options = 1;
  static constexpr Input inputs[] = {{"x"}, {"mean"}, {"logvar"}};

  template <class V>
  static FASTVAE_INLINE Result<V, 3> eval(const V (&in)[3], const V* opt) {
    const V half = num<V>(0.5), logvar = in[2];
    const auto precision = exp_factor(-half * logvar);  // 1/σ
    const V u = precision * (in[0] - in[1]), g = precision * u, square = half * u * u;
    return {opt[0] - half * logvar - square, {-g, g, square - half}};
  }
};

}  // namespace fastvae
