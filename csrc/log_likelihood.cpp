// log_likelihood: CPU implementation, autograd, routing; elbo builds on it.
#include <torch/csrc/autograd/graph_task.h>

#include "ops.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, std::vector<Tensor>> log_likelihood_forward_cpu(
    const Tensor& x, at::TensorList params, c10::string_view family, at::ArrayRef<double> options,
    const OptTensor& mask, const OptTensor& weight, double scale,
    std::array<bool, max_inputs> needs) {
  const std::vector<Tensor> inputs = with_x(x, params);
  TORCH_CHECK_VALUE(inputs.size() > 1 && inputs.size() <= max_inputs, "params must hold 1 to ",
                    max_inputs - 1, " tensors, got ", params.size());
  const Needs list(needs.begin(), needs.begin() + inputs.size());
  auto r = rowwise_cpu(make_spec(family, options), inputs, mask, weight, scale, list);
  return {std::move(r.value), std::move(r.grads)};
}

std::tuple<Tensor, std::vector<Tensor>> log_likelihood_forward(
    const Tensor& x, at::TensorList params, c10::string_view family, at::ArrayRef<double> options,
    const OptTensor& mask, const OptTensor& weight, double scale,
    std::array<bool, max_inputs> needs) {
  static const auto op =
      typed_op<decltype(log_likelihood_forward_cpu)>("fastvae::log_likelihood_forward");
  return op.call(x, params, family, options, mask, weight, scale, needs);
}

std::tuple<Tensor, std::vector<Tensor>> run_forward(const Call& call, at::TensorList inputs,
                                                    const OptTensor& weight, double scale,
                                                    const Needs& wanted) {
  std::array<bool, max_inputs> needs{};
  std::copy(wanted.begin(), wanted.end(), needs.begin());
  return log_likelihood_forward(inputs[0], inputs.slice(1), call.family, call.spec.options,
                                call.mask, weight, scale, needs);
}

}  // namespace

c10::intrusive_ptr<Call> make_call(at::TensorList inputs, c10::string_view family,
                                   at::ArrayRef<double> options, const OptTensor& mask) {
  auto call = c10::make_intrusive<Call>();
  call->spec = make_spec(family, options);
  call->family = std::string(family);
  call->mask = mask;
  call->needs.assign(inputs.size(), false);
  if (at::GradMode::is_enabled())
    for (size_t j = 0; j < inputs.size(); ++j) call->needs[j] = inputs[j].requires_grad();
  return call;
}

Tensor forward_and_save(AutogradContext* ctx, at::TensorList inputs,
                        const c10::intrusive_ptr<Call>& call) {
  call->recompute = inputs[1].scalar_type() == at::kHalf;
  auto [value, grads] = run_forward(*call, inputs, call->weight, call->scale,
                                    call->recompute ? Needs{} : call->needs);
  variable_list saved(inputs.begin(), inputs.end());
  saved.insert(saved.end(), grads.begin(), grads.end());
  ctx->save_for_backward(std::move(saved));
  ctx->saved_data["call"] = c10::IValue::make_capsule(call);
  return value;
}

variable_list likelihood_grads(const Call& call, const variable_list& saved,
                               const Tensor& upstream) {
  const size_t count = call.needs.size();
  const at::TensorList inputs = at::TensorList(saved).slice(0, count);
  variable_list out(count);
  if (at::GradMode::is_enabled() && (upstream.requires_grad() || any_requires_grad(inputs))) {
    const Tensor factor = call.weighted(upstream, call.scale);
    auto grads = rowwise_composite_grads(call.spec, inputs, call.mask, factor, call.needs);
    for (size_t j = 0, k = 0; j < count; ++j)
      if (call.needs[j]) out[j] = grads[k++];
    return out;
  }
  std::vector<Tensor> grads;
  if (call.recompute) {
    at::AutoDispatchBelowAutograd guard;
    Tensor factor = call.weighted(upstream, call.scale);
    if (factor.dim() == 0) factor = factor.expand({inputs[0].size(0)});
    grads = std::get<1>(run_forward(call, inputs, factor, 1.0, call.needs));
  } else {
    // The buffers are ours alone unless the graph is kept: then they must survive for the next
    // backward.
    const bool plain = is_plain_cpu(upstream);
    const bool ours = plain && !torch::autograd::get_current_graph_task_keep_graph();
    const bool one = plain && upstream.dim() == 0 && upstream.item<double>() == 1.0;
    const Tensor factor = unsqueeze_event(upstream, inputs[0].dim() - 1);
    for (size_t k = count; k < saved.size(); ++k) {
      Tensor grad = saved[k];
      if (!ours)
        grad = (grad * factor).to(grad.scalar_type());
      else if (!one)
        grad.mul_(factor);
      grads.push_back(grad);
    }
  }
  for (size_t j = 0, k = 0; j < count; ++j)
    if (call.needs[j]) out[j] = reduce_to(grads[k++], inputs[j]);
  return out;
}

namespace {

struct LogLikelihood : torch::autograd::Function<LogLikelihood> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs,
                        const c10::intrusive_ptr<Call>& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_and_save(ctx, inputs, call);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto call = saved_call(ctx);
    variable_list grads(call->needs.size() + 1);
    if (!upstream[0].defined()) return grads;
    auto input_grads = likelihood_grads(*call, ctx->get_saved_variables(), upstream[0]);
    std::move(input_grads.begin(), input_grads.end(), grads.begin());
    return grads;
  }
};

}  // namespace

Tensor log_likelihood_composite(const Tensor& x, at::TensorList params, c10::string_view family,
                                at::ArrayRef<double> options, const OptTensor& mask) {
  return rowwise_composite(make_spec(family, options), with_x(x, params), mask);
}

Tensor log_likelihood_cpu(const Tensor& x, at::TensorList params, c10::string_view family,
                          at::ArrayRef<double> options, const OptTensor& mask) {
  return std::get<0>(log_likelihood_forward(x, params, family, options, mask, {}, 1.0, {}));
}

namespace {

Tensor log_likelihood_autograd(const Tensor& x, at::TensorList params, c10::string_view family,
                               at::ArrayRef<double> options, const OptTensor& mask) {
  const auto inputs = with_x(x, params);
  if (needs_composite(inputs)) return log_likelihood_composite(x, params, family, options, mask);
  return LogLikelihood::apply(at::TensorList(inputs), make_call(inputs, family, options, mask));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("log_likelihood_forward", log_likelihood_forward_cpu);
  m.impl("log_likelihood", log_likelihood_cpu);
}

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("log_likelihood", log_likelihood_autograd); }

TORCH_LIBRARY_IMPL(fastvae, FuncTorchBatchedDecomposition, m) {
  m.impl("log_likelihood", log_likelihood_composite);
}

}  // namespace fastvae
