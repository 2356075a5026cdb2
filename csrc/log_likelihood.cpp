// log_likelihood: implementation, autograd, routing; elbo and kl_divergence build on it.
#include <torch/csrc/autograd/graph_task.h>

#include "device_kernels.h"
#include "ops.h"
#include "triton.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, std::vector<Tensor>> row_forward_fused(const Tensor& x, at::TensorList params,
                                                          c10::string_view family,
                                                          at::ArrayRef<double> options,
                                                          const OptTensor& mask,
                                                          const OptTensor& weight, double scale,
                                                          std::array<bool, max_inputs> needs) {
  const std::vector<Tensor> inputs = with_x(x, params);
  const bool kl = family == formula_name(kl_spec(inputs.size()).formula);
  const Spec spec = kl ? kl_spec(inputs.size()) : make_spec(family, options, inputs.size());
  const Needs list(needs.begin(), needs.begin() + inputs.size());
  auto r = rowwise(spec, inputs, mask, weight, scale, list);
  return {std::move(r.value), std::move(r.grads)};
}

std::tuple<Tensor, std::vector<Tensor>> row_forward(const Tensor& x, at::TensorList params,
                                                    c10::string_view family,
                                                    at::ArrayRef<double> options,
                                                    const OptTensor& mask, const OptTensor& weight,
                                                    double scale,
                                                    std::array<bool, max_inputs> needs) {
  static const auto op = typed_op<decltype(row_forward_fused)>("fastvae::row_forward");
  return op.call(x, params, family, options, mask, weight, scale, needs);
}

std::tuple<Tensor, std::vector<Tensor>> run_forward(const Call& call, at::TensorList inputs,
                                                    const OptTensor& weight, double scale,
                                                    const Needs& wanted) {
  std::array<bool, max_inputs> needs{};
  std::copy(wanted.begin(), wanted.end(), needs.begin());
  return row_forward(inputs[0], inputs.slice(1), formula_name(call.spec.formula), call.spec.options,
                     call.mask, weight, scale, needs);
}

}  // namespace

Call make_call(Spec spec, at::TensorList inputs, const OptTensor& mask) {
  Call call;
  call.spec = std::move(spec);
  call.mask = mask;
  call.needs.assign(inputs.size(), false);
  for (size_t j = 0; j < inputs.size() && at::GradMode::is_enabled(); ++j) {
    call.needs[j] = inputs[j].requires_grad() && has_derivative(call.spec, j);
    call.recompute |= call.needs[j] && inputs[j].scalar_type() == at::kHalf;
  }
  return call;
}

Tensor forward_and_save(AutogradContext* ctx, at::TensorList inputs, const Call& call,
                        const Tensor& kl) {
  Tensor value;
  std::vector<Tensor> grads;
  if (call.overwrite) {
    auto r =
        rowwise(call.spec, inputs, call.mask, call.weight, call.scale, call.needs, call.overwrite);
    value = std::move(r.value), grads = std::move(r.grads);
    // Whoever saved what was there before, the decoder's last op for one, is told so in backward.
    for (size_t j = 1; j < inputs.size(); ++j)
      if (call.needs[j] && varies_along(call.spec, inputs, j) == Along::both)
        inputs[j].unsafeGetTensorImpl()->bump_version();
  } else {
    std::tie(value, grads) =
        run_forward(call, inputs, call.weight, call.scale, call.recompute ? Needs{} : call.needs);
  }
  triton::remember(ctx);
  variable_list saved(inputs.begin(), inputs.end());
  saved.push_back(call.mask.value_or(Tensor()));
  saved.push_back(call.weight.value_or(Tensor()));
  saved.push_back(kl);
  saved.push_back(kl.defined() ? value : Tensor());
  saved.insert(saved.end(), grads.begin(), grads.end());
  ctx->save_for_backward(std::move(saved));
  // What differs from step to step stands alone, so that compiled autograd makes it an argument;
  // the rest in one entry, for each costs an allocation.
  std::vector<double> packed{static_cast<double>(call.spec.formula),
                             static_cast<double>(inputs.size()),
                             static_cast<double>(call.recompute), static_cast<double>(call.kl_type),
                             static_cast<double>(call.overwrite)};
  packed.insert(packed.end(), call.needs.begin(), call.needs.end());
  packed.insert(packed.end(), call.spec.options.begin(), call.spec.options.end());
  ctx->saved_data["call"] = std::move(packed);
  ctx->saved_data["scale"] = call.scale;
  ctx->saved_data["kl_scale"] = call.kl_scale;
  return value;
}

Saved load_saved(AutogradContext* ctx) {
  Saved saved;
  Call& call = saved.call;
  const auto packed = ctx->saved_data["call"].toDoubleVector();
  call.spec.formula = static_cast<int>(packed[0]);
  const auto count = static_cast<size_t>(packed[1]);
  call.recompute = packed[2] != 0;
  call.kl_type = static_cast<at::ScalarType>(packed[3]);
  call.overwrite = packed[4] != 0;
  const auto needs = packed.begin() + 5, options = needs + count;
  call.needs.assign(needs, options);
  call.spec.options.assign(options, packed.end());
  call.scale = ctx->saved_data["scale"].toDouble();
  call.kl_scale = ctx->saved_data["kl_scale"].toDouble();
  variable_list tensors = ctx->get_saved_variables();
  saved.inputs.assign(tensors.begin(), tensors.begin() + count);
  if (tensors[count].defined()) call.mask = tensors[count];
  if (tensors[count + 1].defined()) call.weight = tensors[count + 1];
  saved.kl = tensors[count + 2];
  saved.log_likelihood = tensors[count + 3];
  saved.grads.assign(tensors.begin() + count + 4, tensors.end());
  return saved;
}

namespace {

// A saved gradient may be reused as its own product with the upstream one unless somebody else can
// see it: a later backward, where the graph is kept, or Python, where a saved-tensor hook took it.
bool only_ours(const Tensor& grad) {
  return !torch::autograd::get_current_graph_task_keep_graph() &&
         grad.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() == nullptr;
}

// A scalar, or one that sum() has expanded to the rows.
bool is_one_number(const Tensor& t) {
  const auto strides = t.strides();
  return t.numel() > 0 &&
         std::all_of(strides.begin(), strides.end(), [](auto s) { return s == 0; });
}

// Whether no row has another factor than the next; traced, only of a scalar is it known.
bool is_one_factor(const Tensor& upstream) {
  return upstream.dim() == 0 || (is_plain(upstream) && is_one_number(upstream));
}

// Whether a gradient is summed over the rows: then it must know each row's factor beforehand.
bool sums_rows(const Saved& saved) {
  for (size_t j = 1; j < saved.inputs.size(); ++j)
    if (saved.call.needs[j] && varies_along(saved.call.spec, saved.inputs, j) == Along::columns)
      return true;
  return false;
}

}  // namespace

variable_list likelihood_grads(const Saved& saved, const Tensor& upstream) {
  const Call& call = saved.call;
  const size_t count = call.needs.size();
  variable_list out(count);
  std::vector<Tensor> grads;
  if (needs_composite_backward({upstream}, saved.inputs) ||
      (call.weight && needs_composite_backward({}, {*call.weight}))) {
    TORCH_CHECK(!call.overwrite,
                "inplace_backward=True overwrote the reconstruction by its gradient: leave it out "
                "for create_graph=True or batched gradients");
    const auto value = [&](at::TensorList in) {
      return std::vector<Tensor>{rowwise_composite(call.spec, in, call.mask)};
    };
    grads = composite_grads(value, saved.inputs, call.needs, {call.weighted(upstream, call.scale)});
  } else if (call.recompute || (sums_rows(saved) && !is_one_factor(upstream))) {
    at::AutoDispatchBelowAutograd guard;
    Tensor factor = call.weighted(upstream, call.scale);
    if (factor.dim() == 0) factor = per_row(factor, saved.inputs[0]);
    grads = std::get<1>(run_forward(call, saved.inputs, factor, 1.0, call.needs));
  } else {
    const DeviceKernels& device = kernels_for(upstream);
    const bool plain = is_plain(upstream);
    // On a GPU the kernel looks whether the factor is one: the host would have to wait for it.
    const bool one =
        plain && device.host && is_one_number(upstream) && scalar_value(upstream) == 1.0;
    const int64_t lead = row_dims(call.spec, saved.inputs);
    for (size_t j = 0, k = 0; j < count; ++j) {
      if (!call.needs[j]) continue;
      const Tensor& grad = saved.grads[k++];
      // What is summed over the rows has one factor.
      const bool summed = varies_along(call.spec, saved.inputs, j) == Along::columns;
      if (one && only_ours(grad)) {
        grads.push_back(grad);
      } else if (plain && only_ours(grad)) {
        const auto rows = grad.sizes().slice(0, lead);
        const Tensor factor =
            summed ? upstream.flatten().slice(0, 0, 1) : upstream.expand(rows).flatten();
        device.scale_rows(dense_rows(grad, factor.numel()), factor);
        grads.push_back(grad);
      } else {
        const Tensor factor = summed ? upstream.flatten().slice(0, 0, 1).reshape({})
                                     : unsqueeze_event(upstream, grad.dim() - lead);
        grads.push_back(at::where(factor == 0, 0, grad * factor).to(grad.scalar_type()));
      }
    }
  }
  for (size_t j = 0, k = 0; j < count; ++j)
    if (call.needs[j] && grads[k++].defined()) out[j] = reduce_to(grads[k - 1], saved.inputs[j]);
  return out;
}

namespace {

struct Rows : torch::autograd::Function<Rows> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs, const Call& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_and_save(ctx, inputs, call);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const triton::Asked where(triton::remembered(ctx));
    const Saved saved = load_saved(ctx);
    variable_list grads(saved.inputs.size() + 1);
    if (!upstream[0].defined()) return grads;
    auto input_grads = likelihood_grads(saved, upstream[0]);
    std::move(input_grads.begin(), input_grads.end(), grads.begin());
    return grads;
  }
};

}  // namespace

Tensor rows_autograd(at::TensorList inputs, const Call& call) { return Rows::apply(inputs, call); }

Tensor log_likelihood_composite(const Tensor& x, at::TensorList params, c10::string_view family,
                                at::ArrayRef<double> options, const OptTensor& mask) {
  return rowwise_composite(make_spec(family, options, params.size() + 1), with_x(x, params), mask);
}

Tensor log_likelihood_fused(const Tensor& x, at::TensorList params, c10::string_view family,
                            at::ArrayRef<double> options, const OptTensor& mask) {
  return std::get<0>(row_forward(x, params, family, options, mask, {}, 1.0, {}));
}

namespace {

Tensor log_likelihood_autograd(const Tensor& x, at::TensorList params, c10::string_view family,
                               at::ArrayRef<double> options, const OptTensor& mask) {
  const auto inputs = with_x(x, params);
  if (needs_composite(inputs)) return log_likelihood_composite(x, params, family, options, mask);
  return rows_autograd(inputs, make_call(make_spec(family, options, inputs.size()), inputs, mask));
}

void likelihood_implementations(torch::Library& m) {
  m.impl("row_forward", row_forward_fused);
  m.impl("log_likelihood", log_likelihood_fused);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) { likelihood_implementations(m); }
TORCH_LIBRARY_IMPL(fastvae, CUDA, m) { likelihood_implementations(m); }

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("log_likelihood", log_likelihood_autograd); }

TORCH_LIBRARY_IMPL(fastvae, FuncTorchBatchedDecomposition, m) {
  m.impl("log_likelihood", log_likelihood_composite);
}

}  // namespace fastvae
