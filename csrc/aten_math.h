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

// max(ln x, floor) and max(ln(1 + x), floor); where the logarithm is −∞ the derivative is 0, not
// NaN.
inline Tensor log_floor(const Tensor& x, const Tensor& floor) {
  const Tensor inside = x > 0;
  return at::maximum(at::where(inside, at::log(at::where(inside, x, 1.0)), floor), floor);
}

inline Tensor log1p_floor(const Tensor& x, const Tensor& floor) {
  const Tensor inside = x > -1;
  return at::maximum(at::where(inside, at::log1p(at::where(inside, x, 0.0)), floor), floor);
}

struct LogisticTensor {
  Tensor log_p, log_q, p, q;
};

inline LogisticTensor logistic(const Tensor& l) {
  return {at::log_sigmoid(l), at::log_sigmoid(-l), at::sigmoid(l), at::sigmoid(-l)};
}

struct PhiExpm1Tensor {
  Tensor phi, expm1;
};

// e^d − 1 − d: its series for |d| < 0.25, where the difference cancels (13 terms: below 1e-17).
inline PhiExpm1Tensor phi_expm1(const Tensor& d) {
  const Tensor e = at::expm1(d), s = at::clamp(d, -0.25, 0.25);
  Tensor series = at::full_like(s, 1.0 / std::tgamma(15.0));
  for (int k = 13; k >= 2; --k) series = series * s + 1.0 / std::tgamma(k + 1.0);
  return {at::where(d.abs() < 0.25, series * s * s, e - d), e};
}

}  // namespace fastvae
