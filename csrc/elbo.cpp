// elbo: the loss from log-likelihood and KL; implementation, autograd, routing.
#include "device_kernels.h"
#include "ops.h"
#include "triton.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum class Reduction { none, mean, sum };

Reduction parse_reduction(c10::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  TORCH_CHECK_VALUE(false, "reduction must be one of mean, sum, none, got ", name);
}

// d(reduced) / d(one row's loss), the weights apart. The mean over an empty batch is 0, not NaN.
// Traced, the size becomes a constant: it is read for the mean alone.
double row_scale(Reduction reduction, const Tensor& batch) {
  return reduction == Reduction::mean ? 1.0 / std::max<int64_t>(batch.size(0), 1) : 1.0;
}

// (loss, log-likelihood, kl), each Σ_b c w_b (…)_b, or per sample for "none"; K is averaged over.
std::tuple<Tensor, Tensor, Tensor> elbo_reduce_fused(const Tensor& log_likelihood, const Tensor& kl,
                                                     const OptTensor& weight, double beta,
                                                     c10::string_view reduction_name) {
  const Reduction reduction = parse_reduction(reduction_name);
  check_device(log_likelihood, "log_likelihood", kl);
  check_floating(log_likelihood, "log_likelihood");
  check_floating(kl, "kl");
  TORCH_CHECK_VALUE(kl.dim() == 1 && log_likelihood.dim() >= 1 && log_likelihood.dim() <= 2 &&
                        log_likelihood.sizes().back() == kl.size(0),
                    "kl must have one value per sample, got kl ", kl.sizes(),
                    " and log_likelihood ", log_likelihood.sizes());
  if (weight) {
    check_device(*weight, "weight", kl);
    check_floating(*weight, "weight");
    check_same_shape(*weight, "weight", kl, "kl");
  }
  const auto type =
      at::promote_types(compute_type(log_likelihood.scalar_type()), compute_type(kl.scalar_type()));
  const auto sizes = reduction == Reduction::none ? kl.sizes() : at::IntArrayRef();
  const auto make = [&] { return empty(sizes, type, log_likelihood.device()); };
  const ReduceTask task{log_likelihood.contiguous(),
                        kl.contiguous(),
                        weight ? OptTensor(weight->contiguous()) : weight,
                        beta,
                        row_scale(reduction, kl),
                        make(),
                        make(),
                        make()};
  kernels_for(kl).elbo_reduce(task);
  return {task.loss_out, task.log_likelihood_out, task.kl_out};
}

std::tuple<Tensor, Tensor, Tensor> elbo_reduce(const Tensor& log_likelihood, const Tensor& kl,
                                               const OptTensor& weight, double beta,
                                               c10::string_view reduction) {
  static const auto op = typed_op<decltype(elbo_reduce_fused)>("fastvae::elbo_reduce");
  return op.call(log_likelihood, kl, weight, beta, reduction);
}

// d(loss) / d(kl): upstream · kl_scale · weight, [batch].
Tensor kl_gradient(const Call& call, const Tensor& upstream, const Tensor& x, bool graph) {
  // Differentiable, traced or on a GPU: as ops; else in one loop, for a small step feels each op.
  if (graph || !is_plain(upstream) || !kernels_for(upstream).host)
    return per_row(call.weighted(upstream, call.kl_scale), x).to(call.kl_type);
  const int64_t batch = x.size(0);
  std::vector<double> factor(batch, call.kl_scale);
  auto times = [&](const Tensor& t) {
    with_values(t.contiguous(), [&](const auto* p) {
      const int64_t step = t.dim() == 0 ? 0 : 1;
      for (int64_t b = 0; b < batch; ++b) factor[b] *= static_cast<double>(p[b * step]);
    });
  };
  times(upstream);
  if (call.weight) times(*call.weight);
  const Tensor grad = empty({batch}, call.kl_type, at::kCPU);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, call.kl_type, "fastvae_elbo", [&] {
    auto* out = grad.mutable_data_ptr<scalar_t>();
    for (int64_t b = 0; b < batch; ++b) out[b] = static_cast<scalar_t>(factor[b]);
  });
  return grad;
}

// d(loss) / d(weight): upstream · (c β KL − c ln p), [batch].
Tensor weight_gradient(const Saved& saved, const Tensor& upstream) {
  const Call& call = saved.call;
  const bool graph = needs_composite_backward({upstream, saved.kl}, saved.inputs);
  const Tensor rows =
      graph ? rowwise_composite(call.spec, saved.inputs, call.mask) : saved.log_likelihood;
  Tensor per_sample = (rows.dim() == 2 ? rows.sum(0) : rows) * call.scale;  // which holds −c / K
  if (call.kl_scale != 0) per_sample = per_sample + saved.kl * call.kl_scale;
  return (upstream * per_sample).to(call.weight->scalar_type());
}

// ln p and KL, reduced as the loss is, and ln p of each row.
using Parts = std::tuple<Tensor, Tensor, Tensor>;

// They leave through `parts`: a Function with outputs marked as not differentiable is one that
// compiled autograd refuses.
struct Elbo : torch::autograd::Function<Elbo> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs, const Tensor& kl,
                        const OptTensor& weight, const Call& call, double beta,
                        const std::string& reduction, Parts* parts) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const bool of_weight = weight && weight->requires_grad();
    const Tensor value = forward_and_save(ctx, inputs, call, of_weight ? kl : Tensor());
    auto [loss, ll, kl_out] = elbo_reduce(value, kl, weight, beta, reduction);
    *parts = {ll, kl_out, value};
    return loss;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const triton::Asked where(triton::remembered(ctx));
    const Saved saved = load_saved(ctx);
    const size_t count = saved.inputs.size();
    variable_list grads(count + 6);
    if (!upstream[0].defined()) return grads;
    if (ctx->needs_input_grad(count)) {
      const bool graph =
          needs_composite_backward({upstream[0], saved.call.weight.value_or(Tensor())}, {});
      grads[count] = kl_gradient(saved.call, upstream[0], saved.inputs[0], graph);
    }
    if (saved.kl.defined()) grads[count + 1] = weight_gradient(saved, upstream[0]);
    auto input_grads = likelihood_grads(saved, upstream[0]);
    std::move(input_grads.begin(), input_grads.end(), grads.begin());
    return grads;
  }
};

using Terms = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // the loss and its parts

Terms elbo_composite(const Tensor& x, at::TensorList params, const Tensor& kl,
                     c10::string_view family, at::ArrayRef<double> options, const OptTensor& mask,
                     const OptTensor& weight, double beta, c10::string_view reduction_name) {
  const Reduction reduction = parse_reduction(reduction_name);
  const Tensor rows = log_likelihood_composite(x, params, family, options, mask);
  const Tensor ll = rows.dim() == 2 ? rows.mean(0) : rows;
  const double c = row_scale(reduction, x);
  auto reduce = [&](const Tensor& t) {
    const Tensor w = weight ? t * weight->to(t.scalar_type()) : t;
    return reduction == Reduction::none ? w : w.sum() * c;
  };
  return {reduce(beta == 0 ? -ll : kl * beta - ll), reduce(ll).detach(),
          reduce(kl.to(compute_type(kl.scalar_type()))).detach(), rows.detach()};
}

// A view that autograd lets nobody modify: a module's full backward hook returns one, split
// several.
bool is_functions_view(const Tensor& t) {
  const auto* meta = torch::autograd::impl::get_view_autograd_meta(t);
  return meta != nullptr && meta->has_bw_view() &&
         meta->get_creation_meta() != torch::autograd::CreationMeta::DEFAULT;
}

// Whether the parameters can be overwritten by their gradients; ValueError where that would destroy
// something of the user's, false where there is nothing to gain.
bool may_overwrite(const Call& call, at::TensorList inputs, const Tensor& kl, Reduction reduction) {
  for (size_t j = 2; reduction == Reduction::none && j < inputs.size(); ++j)
    if (varies_along(call.spec, inputs, j) == Along::columns)
      return false;  // its gradient may have to be computed with the rows' factors
  if (call.recompute ||
      std::find(call.needs.begin() + 1, call.needs.end(), true) == call.needs.end())
    return false;  // float16's gradients are not stored
  if (!call.needs[1] && !inputs[1].is_contiguous())
    return false;  // gradients would come in its layout
  auto check = [](bool ok, size_t j, const char* what) {
    TORCH_CHECK_VALUE(ok, "inplace_backward=True overwrites the reconstruction, but parameter ",
                      j - 1, " of it ", what);
  };
  auto overlap = [](const OptTensor& a, const Tensor& b) { return a && a->is_alias_of(b); };
  for (size_t j = 1; j < inputs.size(); ++j) {
    const Tensor& t = inputs[j];
    if (!is_plain(t)) return false;
    if (!call.needs[j] || varies_along(call.spec, inputs, j) != Along::both) continue;
    check(!t.is_leaf() && !(t.is_view() && t._base().is_leaf()), j,
          "is a leaf or a view of one: an optimizer's or your own data");
    check(!is_functions_view(t), j,
          "is a view that a Function returned, as those of split, unbind and a module's full "
          "backward hook: use register_hook on tensors, clone it, or leave inplace_backward out");
    check(t.is_contiguous(), j, "is not contiguous");
    check(!overlap(kl, t) && !overlap(call.mask, t) && !overlap(call.weight, t), j,
          "shares memory with another argument");
    for (size_t i = 0; i < inputs.size(); ++i)
      check(i == j || !inputs[i].is_alias_of(t), j, "shares memory with another argument");
  }
  return true;
}

Terms elbo_routed(const Tensor& x, at::TensorList params, const Tensor& kl, c10::string_view family,
                  at::ArrayRef<double> options, const OptTensor& mask, const OptTensor& weight,
                  double beta, c10::string_view reduction, bool overwrite) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have a batch dimension, got ", x.sizes());
  auto inputs = with_x(x, params);
  inputs.push_back(kl);
  if (weight) inputs.push_back(*weight);
  if (needs_composite(inputs))
    return elbo_composite(x, params, kl, family, options, mask, weight, beta, reduction);
  inputs.resize(1 + params.size());
  Call call = make_call(make_spec(family, options, inputs.size()), inputs, mask);
  const double c = row_scale(parse_reduction(reduction), x);
  // Traced, size() would make constants of the other dimensions too.
  const bool sampled = row_dims(call.spec, inputs) > 1;
  const int64_t samples = sampled ? params[0].sym_size(0).guard_int(__FILE__, __LINE__) : 1;
  call.weight = weight;
  call.scale = -c / static_cast<double>(samples);
  call.kl_scale = c * beta;
  call.kl_type = kl.scalar_type();
  call.overwrite = overwrite && may_overwrite(call, inputs, kl, parse_reduction(reduction));
  Parts parts;
  const Tensor loss =
      Elbo::apply(at::TensorList(inputs), kl, weight, call, beta, std::string(reduction), &parts);
  return std::tuple_cat(std::tie(loss), parts);
}

Terms elbo_autograd(const Tensor& x, at::TensorList params, const Tensor& kl,
                    c10::string_view family, at::ArrayRef<double> options, const OptTensor& mask,
                    const OptTensor& weight, double beta, c10::string_view reduction) {
  return elbo_routed(x, params, kl, family, options, mask, weight, beta, reduction, false);
}

Terms elbo_inplace_autograd(const Tensor& x, at::TensorList params, const Tensor& kl,
                            c10::string_view family, at::ArrayRef<double> options,
                            const OptTensor& mask, const OptTensor& weight, double beta,
                            c10::string_view reduction) {
  return elbo_routed(x, params, kl, family, options, mask, weight, beta, reduction, true);
}

Terms elbo_fused(const Tensor& x, at::TensorList params, const Tensor& kl, c10::string_view family,
                 at::ArrayRef<double> options, const OptTensor& mask, const OptTensor& weight,
                 double beta, c10::string_view reduction) {
  const Tensor rows = log_likelihood_fused(x, params, family, options, mask);
  return std::tuple_cat(elbo_reduce(rows, kl, weight, beta, reduction), std::tie(rows));
}

void elbo_implementations(torch::Library& m) {
  m.impl("elbo_reduce", elbo_reduce_fused);
  m.impl("elbo", elbo_fused);
  m.impl("elbo_inplace", elbo_fused);  // no gradient is asked for: nothing is overwritten
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) { elbo_implementations(m); }
TORCH_LIBRARY_IMPL(fastvae, CUDA, m) { elbo_implementations(m); }

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("elbo", elbo_autograd);
  m.impl("elbo_inplace", elbo_inplace_autograd);
}

TORCH_LIBRARY_IMPL(fastvae, FuncTorchBatchedDecomposition, m) {
  m.impl("elbo", elbo_composite);
  m.impl("elbo_inplace", elbo_composite);
}

}  // namespace fastvae
