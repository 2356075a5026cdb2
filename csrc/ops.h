// What the operators use of one another.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include "rowwise.h"

namespace fastvae {

// --- kl_divergence.cpp ---

inline Spec kl_spec(size_t inputs) {
  return {inputs == 2 ? Family::StandardKL : Family::NormalKL, {}};
}

Tensor kl_divergence_composite(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                               const OptTensor& prior_logvar);

// --- log_likelihood.cpp: what elbo shares ---

// What a call needs besides its differentiable inputs; the KL's fields are elbo's alone.
struct Call : torch::CustomClassHolder {
  Spec spec;
  std::string family;
  OptTensor mask, weight;
  Needs needs;            // of [x, parameters...]
  double scale = 1.0;     // d(loss) / d(ln p of one row), the weights apart
  double kl_scale = 0.0;  // d(loss) / d(kl of one row), likewise
  // float16 gradients are not saved but computed in backward, with the upstream factor in float32:
  // 1/B of them would drop into the subnormals before a GradScaler's factor arrives.
  bool recompute = false;
  at::ScalarType kl_type = at::kFloat;

  Tensor weighted(const Tensor& g, double s) const {
    return weight ? g * (weight->to(g.scalar_type()) * s) : g * s;
  }
};

// The gradients that are wanted now are those that autograd will ask for.
c10::intrusive_ptr<Call> make_call(at::TensorList inputs, c10::string_view family,
                                   at::ArrayRef<double> options, const OptTensor& mask);

// Runs the fused op and saves its gradients beside the inputs (which a double backward needs).
Tensor forward_and_save(torch::autograd::AutogradContext* ctx, at::TensorList inputs,
                        const c10::intrusive_ptr<Call>& call);

// Gradients of the inputs, given the upstream gradient of the loss (a scalar or [rows...]).
torch::autograd::variable_list likelihood_grads(const Call& call,
                                                const torch::autograd::variable_list& saved,
                                                const Tensor& upstream);

inline c10::intrusive_ptr<Call> saved_call(torch::autograd::AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
}

inline std::vector<Tensor> with_x(const Tensor& x, at::TensorList params) {
  std::vector<Tensor> inputs{x};
  inputs.insert(inputs.end(), params.begin(), params.end());
  return inputs;
}

Tensor log_likelihood_composite(const Tensor& x, at::TensorList params, c10::string_view family,
                                at::ArrayRef<double> options, const OptTensor& mask);

Tensor log_likelihood_cpu(const Tensor& x, at::TensorList params, c10::string_view family,
                          at::ArrayRef<double> options, const OptTensor& mask);

}  // namespace fastvae
