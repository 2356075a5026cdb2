// What the operators use of one another.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "rowwise.h"

namespace fastvae {

// --- kl_divergence.cpp ---

Tensor kl_divergence_composite(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                               const OptTensor& prior_logvar, const OptTensor& mask);

// --- log_likelihood.cpp: what elbo and kl_divergence share ---

// What a call needs besides its differentiable inputs; the KL's field is elbo's alone.
struct Call {
  Spec spec;
  OptTensor mask, weight;
  Needs needs;            // of [x, parameters...]
  double scale = 1.0;     // d(loss) / d(ln p of one row), the weights apart
  double kl_scale = 0.0;  // d(loss) / d(kl of one row), likewise
  at::ScalarType kl_type = at::kFloat;
  // Gradients for float16 inputs are not saved but computed in backward, with the upstream factor
  // in float32: 1/B of them would drop into the subnormals before a GradScaler's factor arrives.
  bool recompute = false;
  // Parameters are overwritten by their gradients (`inplace_backward`).
  bool overwrite = false;

  Tensor weighted(const Tensor& g, double s) const {
    return weight ? g * (weight->to(g.scalar_type()) * s) : g * s;
  }
};

// The gradients that are wanted are those that autograd will ask for.
Call make_call(Spec spec, at::TensorList inputs, const OptTensor& mask);

// The value of each row, with the autograd Function of every row formula.
Tensor rows_autograd(at::TensorList inputs, const Call& call);

// Runs the fused op and saves what backward needs: inputs, mask, weight, gradients, and the call.
// With a `kl`, which the gradient of elbo's weight needs, that and the rows' ln p as well.
Tensor forward_and_save(torch::autograd::AutogradContext* ctx, at::TensorList inputs,
                        const Call& call, const Tensor& kl = {});
struct Saved {
  Call call;
  std::vector<Tensor> inputs, grads;
  Tensor kl, log_likelihood;  // undefined where no gradient of the weight is wanted
};
Saved load_saved(torch::autograd::AutogradContext* ctx);

// Gradients of the inputs, given the upstream gradient of the loss (a scalar or [rows...]).
torch::autograd::variable_list likelihood_grads(const Saved& saved, const Tensor& upstream);

inline std::vector<Tensor> with_x(const Tensor& x, at::TensorList params) {
  std::vector<Tensor> inputs{x};
  inputs.insert(inputs.end(), params.begin(), params.end());
  return inputs;
}

Tensor log_likelihood_composite(const Tensor& x, at::TensorList params, c10::string_view family,
                                at::ArrayRef<double> options, const OptTensor& mask);

Tensor log_likelihood_fused(const Tensor& x, at::TensorList params, c10::string_view family,
                            at::ArrayRef<double> options, const OptTensor& mask);

}  // namespace fastvae
