// The formulas' vocabulary for whole tensors: the differentiable composite behind double backward,
// forward-mode AD and torch.func. exp and max are found in at:: by argument-dependent look-up.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>

#include <cmath>

namespace fastvae {

using at::Tensor;

template <class V>
V num(double v) {
  return at::native::wrapped_scalar_tensor(v);  // a wrapped number: does not promote float32
}

// e^x as a factor: it need not be a number itself where its product is one. The derivatives are
// taken through e^(x − x₀) at x = x₀, which is one: through the halves they would overflow before
// the result does.
struct ExpFactorTensor {
  Tensor half, one;
  friend Tensor operator*(const ExpFactorTensor& e, const Tensor& a) {
    return e.half * a * e.half * e.one;
  }
};

inline ExpFactorTensor exp_factor(const Tensor& x) {
  const double limit = x.scalar_type() == at::kDouble ? 1400.0 : 174.0;
  const Tensor c = at::clamp(x, -limit, limit), fixed = c.detach();
  return {at::exp(0.5 * fixed), at::exp(c - fixed)};
}

struct FlooredLogsTensor {
  Tensor log_p, log_q;
};

// max(ln p, floor) and max(ln(1 − p), floor), with the derivatives (1 − p)/v and −p/v that
// BCELoss gives them, v = max(p (1 − p), 1e-12), to every order: under v's floor the value is that
// of an antiderivative, moved onto the logarithm's.
inline FlooredLogsTensor floored_logs(const Tensor& p, const Tensor& floor) {
  const Tensor inside = p * (1 - p) >= 1e-12, safe = at::where(inside, p, 0.5);
  const Tensor log_p = at::where(inside, at::log(safe), 1e12 * (p - 0.5 * p * p));
  const Tensor log_q = at::where(inside, at::log1p(-safe), -0.5e12 * p * p);
  const Tensor fixed = p.detach();
  const Tensor exact_p = at::maximum(at::log(fixed), floor);
  const Tensor exact_q = at::maximum(at::log1p(-fixed), floor);
  return {exact_p + (log_p - log_p.detach()), exact_q + (log_q - log_q.detach())};
}

struct LogLogisticTensor {
  Tensor value, odds, slope;
};

// x ln σ(l) + (1 − x) ln σ(−l), all of it in `value`, and its derivative by l.
inline LogLogisticTensor log_logistic(const Tensor& x, const Tensor& l) {
  return {x * at::log_sigmoid(l) + (1 - x) * at::log_sigmoid(-l), Tensor(),
          x * at::sigmoid(-l) - (1 - x) * at::sigmoid(l)};
}

struct HalfPhiExpm1Tensor {
  Tensor phi, expm1;  // ½ (e^d − 1 − d), ½ (e^d − 1)
};

// e^d − 1 − d: its series for |d| < 1, where the difference cancels (up to d^20 / 20!).
inline HalfPhiExpm1Tensor half_phi_expm1(const Tensor& d) {
  // Beyond 40 the one counts for nothing; e^d by its root, as half of it may be a number alone. The
  // derivative of clamp_max at its bound is 1 or 0, by torch's version: the bound lies beyond 40.
  const Tensor root = at::exp(0.5 * d), s = at::clamp(d, -1.0, 1.0);
  const Tensor e = at::where(d > 40.0, 0.5 * root * root, 0.5 * at::expm1(at::clamp_max(d, 41.0)));
  Tensor series = at::full_like(s, 1.0 / std::tgamma(21.0));
  for (int k = 19; k >= 2; --k) series = series * s + 1.0 / std::tgamma(k + 1.0);
  return {at::where(d.abs() < 1.0, 0.5 * series * s * s, e - 0.5 * d), e};
}

}  // namespace fastvae
