// kl_divergence: implementation, autograd, routing. Its backward computes it again; nothing but
// the inputs is saved.
#include <torch/csrc/autograd/custom_function.h>

#include "ops.h"
#include "triton.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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
                           const OptTensor& prior_logvar) {
  const auto inputs = kl_inputs(mu, logvar, prior_mu, prior_logvar);
  return rowwise(kl_spec(inputs.size()), inputs, {}, {}, 1.0, {}).value;
}

std::vector<Tensor> kl_divergence_backward_fused(const Tensor& grad, const Tensor& mu,
                                                 const Tensor& logvar, const OptTensor& prior_mu,
                                                 const OptTensor& prior_logvar,
                                                 std::array<bool, max_inputs> needs) {
  const auto inputs = kl_inputs(mu, logvar, prior_mu, prior_logvar);
  check_device(grad, "grad", mu);
  check_dense(grad, "grad");
  check_floating(grad, "grad");
  TORCH_CHECK_VALUE(grad.sizes() == mu.sizes().slice(0, 1), "grad must have shape [", mu.size(0),
                    "], got ", grad.sizes());
  const Needs list(needs.begin(), needs.begin() + inputs.size());
  return rowwise(kl_spec(inputs.size()), inputs, {}, grad, 1.0, list).grads;
}

}  // namespace

Tensor kl_divergence_composite(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                               const OptTensor& prior_logvar) {
  const auto inputs = kl_inputs(mu, logvar, prior_mu, prior_logvar);
  return rowwise_composite(kl_spec(inputs.size()), inputs, {});
}

namespace {

struct KLDivergence : torch::autograd::Function<KLDivergence> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    triton::remember(ctx);
    ctx->save_for_backward(variable_list(inputs.begin(), inputs.end()));
    static const auto op = typed_op<decltype(kl_divergence_fused)>("fastvae::kl_divergence");
    return inputs.size() == 2 ? op.call(inputs[0], inputs[1], {}, {})
                              : op.call(inputs[0], inputs[1], inputs[2], inputs[3]);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const triton::Interpret where(triton::remembered(ctx));
    const auto inputs = ctx->get_saved_variables();
    const size_t count = inputs.size();
    variable_list out(count);
    if (!upstream[0].defined()) return out;
    Needs needs(count);
    for (size_t j = 0; j < count; ++j) needs[j] = ctx->needs_input_grad(j);
    std::vector<Tensor> grads;
    if (needs_composite_backward({upstream[0]}, inputs)) {
      grads = rowwise_composite_grads(kl_spec(count), inputs, {}, upstream[0], needs);
    } else {
      at::AutoDispatchBelowAutograd guard;
      static const auto op =
          typed_op<decltype(kl_divergence_backward_fused)>("fastvae::kl_divergence_backward");
      std::array<bool, max_inputs> flags{};
      std::copy(needs.begin(), needs.end(), flags.begin());
      const bool prior = count == 4;
      grads =
          op.call(upstream[0], inputs[0], inputs[1], prior ? OptTensor(inputs[2]) : std::nullopt,
                  prior ? OptTensor(inputs[3]) : std::nullopt, flags);
    }
    for (size_t j = 0, k = 0; j < count; ++j)
      if (needs[j]) out[j] = grads[k++];
    return out;
  }
};

Tensor kl_divergence_autograd(const Tensor& mu, const Tensor& logvar, const OptTensor& prior_mu,
                              const OptTensor& prior_logvar) {
  const auto inputs = kl_inputs(mu, logvar, prior_mu, prior_logvar);
  if (needs_composite(inputs)) return kl_divergence_composite(mu, logvar, prior_mu, prior_logvar);
  return KLDivergence::apply(at::TensorList(inputs));
}

void kl_implementations(torch::Library& m) {
  m.impl("kl_divergence", kl_divergence_fused);
  m.impl("kl_divergence_backward", kl_divergence_backward_fused);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) { kl_implementations(m); }
TORCH_LIBRARY_IMPL(fastvae, CUDA, m) { kl_implementations(m); }

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("kl_divergence", kl_divergence_autograd); }

TORCH_LIBRARY_IMPL(fastvae, FuncTorchBatchedDecomposition, m) {
  m.impl("kl_divergence", kl_divergence_composite);
}

}  // namespace fastvae
