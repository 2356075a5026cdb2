// log_likelihood and elbo: CPU implementations, autograd, routing.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>

#include "rowwise.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- the fused op below autograd: value and gradients in one pass
// ----------------------------------

std::tuple<Tensor, std::vector<Tensor>> log_likelihood_forward_cpu(
    const Tensor& x, at::TensorList params, c10::string_view family, at::ArrayRef<double> options,
    const OptTensor& mask, const OptTensor& weight, double scale,
    std::array<bool, max_inputs> needs) {
  std::vector<Tensor> inputs{x};
  inputs.insert(inputs.end(), params.begin(), params.end());
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
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastvae::log_likelihood_forward", "")
                             .typed<decltype(log_likelihood_forward_cpu)>();
  return op.call(x, params, family, options, mask, weight, scale, needs);
}

enum class Reduction { none, mean, sum };

Reduction parse_reduction(c10::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  TORCH_CHECK_VALUE(false, "reduction must be one of mean, sum, none, got ", name);
}

// d(reduced) / d(one row's loss), the weights apart. The mean over an empty batch is 0, not NaN.
double row_scale(Reduction reduction, int64_t batch) {
  return reduction == Reduction::mean ? 1.0 / std::max<int64_t>(batch, 1) : 1.0;
}

template <class Fn>
void with_values(const Tensor& t, Fn&& fn) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.scalar_type(), "fastvae_elbo",
                                  [&] { fn(t.const_data_ptr<scalar_t>()); });
}

// (loss, log-likelihood, kl), each Σ_b c w_b (…)_b, or per sample for "none"; K is averaged over.
std::tuple<Tensor, Tensor, Tensor> elbo_reduce_cpu(const Tensor& log_likelihood, const Tensor& kl,
                                                   const OptTensor& weight, double beta,
                                                   c10::string_view reduction_name) {
  const Reduction reduction = parse_reduction(reduction_name);
  check_cpu(log_likelihood, "log_likelihood");
  check_cpu(kl, "kl");
  check_floating(log_likelihood, "log_likelihood");
  check_floating(kl, "kl");
  TORCH_CHECK_VALUE(kl.dim() == 1 && log_likelihood.dim() >= 1 && log_likelihood.dim() <= 2 &&
                        log_likelihood.sizes().back() == kl.size(0),
                    "kl must have one value per sample, got kl ", kl.sizes(),
                    " and log_likelihood ", log_likelihood.sizes());
  const int64_t batch = kl.size(0),
                samples = log_likelihood.dim() == 2 ? log_likelihood.size(0) : 1;
  std::vector<double> ll_row(batch, 0.0), kl_row(batch), w(batch, row_scale(reduction, batch));
  with_values(log_likelihood.contiguous(), [&](const auto* p) {
    for (int64_t k = 0; k < samples; ++k)
      for (int64_t b = 0; b < batch; ++b)
        ll_row[b] += static_cast<double>(p[k * batch + b]) / samples;
  });
  with_values(kl.contiguous(), [&](const auto* p) {
    for (int64_t b = 0; b < batch; ++b) kl_row[b] = static_cast<double>(p[b]);
  });
  if (weight) {
    check_cpu(*weight, "weight");
    check_floating(*weight, "weight");
    check_same_shape(*weight, "weight", kl, "kl");
    with_values(weight->contiguous(), [&](const auto* p) {
      for (int64_t b = 0; b < batch; ++b) w[b] *= static_cast<double>(p[b]);
    });
  }
  const auto type =
      at::promote_types(compute_type(log_likelihood.scalar_type()), compute_type(kl.scalar_type()));
  const auto options = log_likelihood.options().dtype(type);
  const bool none = reduction == Reduction::none;
  std::tuple<Tensor, Tensor, Tensor> out;
  auto make = [&] { return none ? at::empty({batch}, options) : at::zeros({}, options); };
  out = {make(), make(), make()};
  AT_DISPATCH_FLOATING_TYPES(type, "fastvae_elbo", [&] {
    auto* loss_out = std::get<0>(out).mutable_data_ptr<scalar_t>();
    auto* ll_out = std::get<1>(out).mutable_data_ptr<scalar_t>();
    auto* kl_out = std::get<2>(out).mutable_data_ptr<scalar_t>();
    double loss = 0, ll_sum = 0, kl_sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const double ll_b = w[b] * ll_row[b], kl_b = w[b] * kl_row[b], loss_b = beta * kl_b - ll_b;
      if (none) {
        loss_out[b] = static_cast<scalar_t>(loss_b);
        ll_out[b] = static_cast<scalar_t>(ll_b);
        kl_out[b] = static_cast<scalar_t>(kl_b);
      }
      loss += loss_b, ll_sum += ll_b, kl_sum += kl_b;
    }
    if (!none) {
      *loss_out = static_cast<scalar_t>(loss);
      *ll_out = static_cast<scalar_t>(ll_sum);
      *kl_out = static_cast<scalar_t>(kl_sum);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> elbo_reduce(const Tensor& log_likelihood, const Tensor& kl,
                                               const OptTensor& weight, double beta,
                                               c10::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastvae::elbo_reduce", "")
                             .typed<decltype(elbo_reduce_cpu)>();
  return op.call(log_likelihood, kl, weight, beta, reduction);
}

// --- autograd ------------------------------------------------------------------------------------

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

std::tuple<Tensor, std::vector<Tensor>> run_forward(const Call& call, at::TensorList inputs,
                                                    const OptTensor& weight, double scale,
                                                    const Needs& wanted) {
  std::array<bool, max_inputs> needs{};
  std::copy(wanted.begin(), wanted.end(), needs.begin());
  return log_likelihood_forward(inputs[0], inputs.slice(1), call.family, call.spec.options,
                                call.mask, weight, scale, needs);
}

// Runs the fused op and saves its gradients beside the inputs (which a double backward needs).
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

// Gradients of the inputs, given the upstream gradient of the loss (a scalar or [rows...]).
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

struct LogLikelihood : torch::autograd::Function<LogLikelihood> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs,
                        const c10::intrusive_ptr<Call>& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_and_save(ctx, inputs, call);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    variable_list grads(call->needs.size() + 1);
    if (!upstream[0].defined()) return grads;
    auto input_grads = likelihood_grads(*call, ctx->get_saved_variables(), upstream[0]);
    std::move(input_grads.begin(), input_grads.end(), grads.begin());
    return grads;
  }
};

struct Elbo : torch::autograd::Function<Elbo> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const Tensor& kl,
                               const c10::intrusive_ptr<Call>& call, double beta,
                               const std::string& reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor value = forward_and_save(ctx, inputs, call);
    auto [loss, ll, kl_out] = elbo_reduce(value, kl, call->weight, beta, reduction);
    ctx->mark_non_differentiable({ll, kl_out});
    return {loss, ll, kl_out};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    variable_list grads(call->needs.size() + 4);
    if (!upstream[0].defined()) return grads;
    const variable_list saved = ctx->get_saved_variables();
    if (ctx->needs_input_grad(call->needs.size())) {
      const int64_t batch = saved[0].size(0);
      grads[call->needs.size()] =
          call->weighted(upstream[0], call->kl_scale).expand({batch}).to(call->kl_type);
    }
    auto input_grads = likelihood_grads(*call, saved, upstream[0]);
    std::move(input_grads.begin(), input_grads.end(), grads.begin());
    return grads;
  }
};

std::vector<Tensor> with_x(const Tensor& x, at::TensorList params) {
  std::vector<Tensor> inputs{x};
  inputs.insert(inputs.end(), params.begin(), params.end());
  return inputs;
}

Tensor log_likelihood_composite(const Tensor& x, at::TensorList params, c10::string_view family,
                                at::ArrayRef<double> options, const OptTensor& mask) {
  return rowwise_composite(make_spec(family, options), with_x(x, params), mask);
}

Tensor log_likelihood_autograd(const Tensor& x, at::TensorList params, c10::string_view family,
                               at::ArrayRef<double> options, const OptTensor& mask) {
  const auto inputs = with_x(x, params);
  if (needs_composite(inputs)) return log_likelihood_composite(x, params, family, options, mask);
  return LogLikelihood::apply(at::TensorList(inputs), make_call(inputs, family, options, mask));
}

Tensor log_likelihood_cpu(const Tensor& x, at::TensorList params, c10::string_view family,
                          at::ArrayRef<double> options, const OptTensor& mask) {
  return std::get<0>(log_likelihood_forward(x, params, family, options, mask, {}, 1.0, {}));
}

using Terms = std::tuple<Tensor, Tensor, Tensor>;

Terms elbo_composite(const Tensor& x, at::TensorList params, const Tensor& kl,
                     c10::string_view family, at::ArrayRef<double> options, const OptTensor& mask,
                     const OptTensor& weight, double beta, c10::string_view reduction_name) {
  const Reduction reduction = parse_reduction(reduction_name);
  Tensor ll = log_likelihood_composite(x, params, family, options, mask);
  if (ll.dim() == 2) ll = ll.mean(0);
  const double c = row_scale(reduction, x.size(0));
  auto reduce = [&](const Tensor& t) {
    const Tensor w = weight ? t * *weight : t;
    return reduction == Reduction::none ? w : w.sum() * c;
  };
  return {reduce(kl * beta - ll), reduce(ll).detach(),
          reduce(kl.to(compute_type(kl.scalar_type()))).detach()};
}

Terms elbo_autograd(const Tensor& x, at::TensorList params, const Tensor& kl,
                    c10::string_view family, at::ArrayRef<double> options, const OptTensor& mask,
                    const OptTensor& weight, double beta, c10::string_view reduction) {
  auto inputs = with_x(x, params);
  inputs.push_back(kl);
  if (needs_composite(inputs))
    return elbo_composite(x, params, kl, family, options, mask, weight, beta, reduction);
  inputs.pop_back();
  auto call = make_call(inputs, family, options, mask);
  const double c = row_scale(parse_reduction(reduction), x.size(0));
  const int64_t samples = params[0].dim() > x.dim() ? params[0].size(0) : 1;
  call->weight = weight;
  call->scale = -c / static_cast<double>(samples);
  call->kl_scale = c * beta;
  call->kl_type = kl.scalar_type();
  auto out = Elbo::apply(at::TensorList(inputs), kl, call, beta, std::string(reduction));
  return {out[0], out[1], out[2]};
}

Terms elbo_cpu(const Tensor& x, at::TensorList params, const Tensor& kl, c10::string_view family,
               at::ArrayRef<double> options, const OptTensor& mask, const OptTensor& weight,
               double beta, c10::string_view reduction) {
  return elbo_reduce(log_likelihood_cpu(x, params, family, options, mask), kl, weight, beta,
                     reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("log_likelihood_forward", log_likelihood_forward_cpu);
  m.impl("elbo_reduce", elbo_reduce_cpu);
  m.impl("log_likelihood", log_likelihood_cpu);
  m.impl("elbo", elbo_cpu);
}

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("log_likelihood", log_likelihood_autograd);
  m.impl("elbo", elbo_autograd);
}

TORCH_LIBRARY_IMPL(fastvae, FuncTorchBatchedDecomposition, m) {
  m.impl("log_likelihood", log_likelihood_composite);
  m.impl("elbo", elbo_composite);
}

}  // namespace fastvae
