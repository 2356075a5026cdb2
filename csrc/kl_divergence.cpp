// kl_divergence: implementation and routing; its autograd Function is the likelihoods'.
#include "device_kernels.h"
#include "ops.h"

namespace fastvae {
namespace {

std::vector<Tensor> kl_inputs(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                              const OptTensor& prior_logvar) {
  TORCH_CHECK_VALUE(prior_mu.has_value() == prior_logvar.has_value(),
                    "prior must be a pair (mu, logvar), got only one of them");
  std::vector<Tensor> inputs{mu, logvar};
  if (prior_mu) inputs.insert(inputs.end(), {*prior_mu, *prior_logvar});
  TORCH_CHECK_VALUE(mu.dim() >= 1, "mu must have a batch dimension, got ", mu.sym_sizes());
  for (const Tensor& t : inputs) check_same_shape(t, "logvar and prior", mu, "mu");
  return inputs;
}

Tensor kl_divergence_fused(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                           const OptTensor& prior_logvar, const OptTensor& mask) {
  const auto inputs = kl_inputs(mu, logvar, prior_mu, prior_logvar);
  return rowwise(kl_spec(inputs.size()), inputs, mask, {}, 1.0, {}).value;
}

}  // namespace

Tensor kl_divergence_composite(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                               const OptTensor& prior_logvar, const OptTensor& mask) {
  const auto inputs = kl_inputs(mu, logvar, prior_mu, prior_logvar);
  return rowwise_composite(kl_spec(inputs.size()), inputs, mask);
}

namespace {

Tensor kl_divergence_autograd(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                              const OptTensor& prior_logvar, const OptTensor& mask) {
  const auto inputs = kl_inputs(mu, logvar, prior_mu, prior_logvar);
  if (needs_composite(inputs))
    return kl_divergence_composite(mu, logvar, prior_mu, prior_logvar, mask);
  Call call = make_call(kl_spec(inputs.size()), inputs, mask);
  // Its gradients take as long to scale as to compute again, if that is two launches instead of
  // one.
  call.recompute |= !kernels_for(mu).host;
  return rows_autograd(inputs, call);
}

void kl_implementations(torch::Library& m) { m.impl("kl_divergence", kl_divergence_fused); }

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) { kl_implementations(m); }
TORCH_LIBRARY_IMPL(fastvae, CUDA, m) { kl_implementations(m); }

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("kl_divergence", kl_divergence_autograd); }

TORCH_LIBRARY_IMPL(fastvae, FuncTorchBatchedDecomposition, m) {
  m.impl("kl_divergence", kl_divergence_composite);
}

}  // namespace fastvae
