#include "rowwise.h"

#include <charconv>

#include "aten_math.h"

#include "formulas/all.h"
#include "triton.h"

namespace fastvae {

const char* formula_name(Family family) {
  return with_formula(family, [](auto f) { return decltype(f)::name; });
}

std::vector<std::string> likelihood_names() {
  return {
#define FASTVAE_NAME(F) F::name,
      FASTVAE_LIKELIHOODS(FASTVAE_NAME)
#undef FASTVAE_NAME
  };
}

Spec make_spec(c10::string_view family, at::ArrayRef<double> options, size_t inputs) {
#define FASTVAE_MATCH(F)                                                                       \
  if (family == F::name) {                                                                     \
    TORCH_CHECK_VALUE(options.size() == F::options, F::name, " takes ", F::options,            \
                      " options, got ", options.size());                                       \
    TORCH_CHECK_VALUE(inputs == F::inputs, F::name, " takes ", F::inputs - 1, " params, got ", \
                      inputs - 1);                                                             \
    return {Family::F, options.vec()};                                                         \
  }
  FASTVAE_LIKELIHOODS(FASTVAE_MATCH)
#undef FASTVAE_MATCH
  TORCH_CHECK_VALUE(false, "likelihood must be one of ", c10::Join(", ", likelihood_names()),
                    ", got ", family);
}

namespace {

void check_inputs(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                  const OptTensor& weight) {
  with_formula(spec.family, [&](auto f) {
    using F = decltype(f);
    const Tensor &x = inputs[0], &full = inputs[1];
    for (int j = 0; j < F::inputs; ++j) {
      check_dense(inputs[j], F::input_names[j]);
      if (j > 0 || (x.scalar_type() != at::kByte && x.scalar_type() != at::kBool))
        check_floating(inputs[j], F::input_names[j]);
    }
    const int64_t event = x.dim() - 1, lead = full.dim() - event;
    TORCH_CHECK_VALUE(
        event >= 0 && (lead == 1 || lead == 2) && full.sizes().slice(lead - 1) == x.sizes(),
        F::input_names[0], " must have the shape of ", F::input_names[1],
        ", with or without a leading sample dimension, got ", x.sizes(), " and ", full.sizes());
    TORCH_CHECK_VALUE(lead == 1 || full.size(0) > 0, F::input_names[1],
                      " must hold at least one sample, got ", full.sizes());
    for (int j = 1; j < F::inputs; ++j) {
      const Tensor& t = inputs[j];
      bool per_row = t.numel() == 1 && t.dim() <= full.dim();
      if (!per_row && t.dim() == full.dim()) {
        per_row = t.sizes().slice(0, lead) == full.sizes().slice(0, lead);
        for (int64_t d = lead; d < full.dim(); ++d) per_row = per_row && t.size(d) == 1;
      }
      TORCH_CHECK_VALUE(per_row || t.sizes() == full.sizes(), F::input_names[j],
                        " must have shape ", full.sizes(), " or be constant along each row, got ",
                        t.sizes());
    }
    if (mask) {
      check_dense(*mask, "mask");
      TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask must be bool, got ",
                       mask->scalar_type());
      check_same_shape(*mask, "mask", x, F::input_names[0]);
    }
    if (weight) {
      check_dense(*weight, "weight");
      check_floating(*weight, "weight");
      TORCH_CHECK_VALUE(weight->sizes() == x.sizes().slice(0, 1) ||
                            weight->sizes() == full.sizes().slice(0, lead),
                        "weight must have shape [", x.size(0), "] or that of the rows, got ",
                        weight->sizes());
    }
  });
}

void check_devices(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                   const OptTensor& weight) {
  with_formula(spec.family, [&](auto f) {
    using F = decltype(f);
    for (int j = 0; j < F::inputs; ++j) check_device(inputs[j], F::input_names[j], inputs[1]);
    if (mask) check_device(*mask, "mask", inputs[1]);
    if (weight) check_device(*weight, "weight", inputs[1]);
  });
}

// The fewest digits that tell the value from its neighbours: 1.0000000000000002 is not "1".
std::string shortest(double v) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, v).ptr};
}

// What to do about values in [low, high] that should be in [0, 1].
const char* way_into_unit(double low, double high, bool data) {
  constexpr double rounding = 1e-3;
  if (low >= -rounding && high <= 1 + rounding) return ": rounding? clamp(0, 1) removes it";
  if (!data) return ": are they logits? likelihood 'bernoulli' takes those";
  if (low >= -rounding && high >= 2 && high <= 255 + rounding)
    return ": for pixel values divide by 255";
  if (low >= -1 - rounding && high <= 1 + rounding)
    return ": for data in [-1, 1] take (x + 1) / 2 (and recon comes before x)";
  return "";
}

[[noreturn]] void raise_outside(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                                unsigned outside, bool overwritten) {
  with_formula(spec.family, [&](auto f) {
    using F = decltype(f);
    for (int j = 0; j < F::inputs; ++j) {
      if (!(outside >> j & 1)) continue;
      TORCH_CHECK_VALUE(j == 0 || !overwritten, F::input_names[j], " must lie in [0, 1] for ",
                        F::name, "; what came is overwritten by its gradient");
      Tensor t = inputs[j].to(at::kDouble);
      if (mask) t = t.masked_select(*mask);
      TORCH_CHECK_VALUE(!t.isnan().any().item<bool>(), F::input_names[j],
                        " must lie in [0, 1] for ", F::name, ", got NaN");
      const double low = t.min().item<double>(), high = t.max().item<double>();
      TORCH_CHECK_VALUE(false, F::input_names[j], " must lie in [0, 1] for ", F::name,
                        ", got values in [", shortest(low), ", ", shortest(high), "]",
                        way_into_unit(low, high, j == 0));
    }
  });
  __builtin_unreachable();
}

}  // namespace

RowwiseResult rowwise(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                      const OptTensor& weight, double scale, const Needs& needs, bool overwrite) {
  check_devices(spec, inputs, mask, weight);
  check_inputs(spec, inputs, mask, weight);
  const Tensor &x = inputs[0], &full = inputs[1];
  const int64_t event = x.dim() - 1, lead = full.dim() - event;
  const auto row_sizes = full.sizes().slice(0, lead);
  const auto compute = compute_type(full.scalar_type());
  const auto order = memory_order(full, lead);
  const bool on_cpu = !triton::serves(full);

  RowwiseArgs a{};
  a.family = spec.family;
  a.rows = product(row_sizes);
  a.cols = product(full.sizes().slice(lead));
  a.use_double = compute == at::kDouble;
  a.scale = scale;
  std::copy(spec.options.begin(), spec.options.end(), a.options);
  RowOperand operands[max_inputs], mask_rows, weight_rows;
  for (size_t j = 0; j < inputs.size(); ++j) {
    const Tensor& t = inputs[j];
    const bool scalar = t.numel() == 1 && t.dim() != full.dim();
    const Tensor view = scalar ? t.reshape({1}) : permute_event(t, order);
    operands[j] = as_rows(view, scalar ? 1 : view.dim() - event, on_cpu);
    a.in[j] = operands[j].operand;
  }
  if (mask) a.mask = (mask_rows = as_rows(permute_event(*mask, order), 1, on_cpu)).operand;
  if (weight) a.weight = (weight_rows = as_rows(*weight, weight->dim())).operand;

  RowwiseResult result;
  const auto is_summed = [&](size_t j) { return j > 0 && inputs[j].sizes() != full.sizes(); };
  for (size_t j = 0; j < needs.size(); ++j) {
    if (!needs[j]) continue;
    a.want_grad = true;
    if (is_summed(j)) {
      std::vector<int64_t> sizes(row_sizes.begin(), row_sizes.end());
      sizes.resize(full.dim(), 1);
      result.grads.push_back(empty(sizes, compute, full.device()));
    } else {
      result.grads.push_back(
          overwrite && j > 0
              ? inputs[j].detach()
              : empty_event(full.sizes(), order, inputs[j].scalar_type(), full.device()));
      a.grad[j] = {result.grads.back().mutable_data_ptr(), dtype_of(inputs[j])};
    }
  }
  result.value = empty(row_sizes, compute, full.device());
  if (!on_cpu) {
    if (a.rows == 0) return result;
    Needs wanted = needs;
    wanted.resize(inputs.size());
    std::vector<Tensor> views, grads;
    for (size_t j = 0; j < inputs.size(); ++j) views.push_back(matrix(operands[j], a.cols));
    for (size_t j = 0, k = 0; j < needs.size(); ++j) {
      if (!needs[j]) continue;
      const Tensor& grad = result.grads[k++];
      grads.push_back(is_summed(j) ? grad.view({a.rows}) : dense_rows(grad, a.rows));
    }
    const auto mask_view = mask ? OptTensor(matrix(mask_rows, a.cols).view(at::kByte)) : mask;
    const auto weight_view = weight ? OptTensor(matrix(weight_rows, 1)) : weight;
    triton::rowwise(formula_name(spec.family), views, mask_view, weight_view, spec.options, scale,
                    x.size(0), result.value.view({a.rows}), grads, wanted);
    return result;
  }

  // A row in several chunks has as many partial sums.
  const int64_t parts = chunks(a.cols);
  std::vector<std::pair<Tensor, std::unique_ptr<double[]>>> sums;
  auto summed = [&](const Tensor& out) -> void* {
    if (parts == 1) return out.mutable_data_ptr();
    sums.emplace_back(out, new double[a.rows * parts]);
    return sums.back().second.get();
  };
  a.sum[0] = summed(result.value);
  for (size_t j = 0, k = 0; j < needs.size(); ++j) {
    if (!needs[j]) continue;
    const Tensor& grad = result.grads[k++];
    if (is_summed(j)) a.sum[1 + j] = summed(grad);
  }
  unsigned outside = 0;
  a.outside = &outside;
  kernels().rowwise(a);
  if (outside) raise_outside(spec, inputs, mask, outside, overwrite);
  for (const auto& [out, partial] : sums) sum_chunks(partial.get(), parts, out);
  return result;
}

namespace {

Tensor apply_mask(const Tensor& t, const OptTensor& mask) {
  return mask ? at::where(*mask, t, at::zeros({}, t.options())) : t;
}

// Evaluates the formula on whole tensors in the compute dtype. Masked elements are zeroed first:
// a NaN there would come back through the product with a zero gradient.
template <class Fn>
auto evaluate(const Spec& spec, at::TensorList inputs, const OptTensor& mask, Fn&& use) {
  check_inputs(spec, inputs, mask, {});
  return with_formula(spec.family, [&](auto f) {
    using F = decltype(f);
    const auto compute = compute_type(inputs[1].scalar_type());
    Tensor in[F::inputs], options[max_options];
    for (int j = 0; j < F::inputs; ++j) {
      in[j] = inputs[j].to(compute);
      if (mask && (j == 0 || inputs[j].sizes() == inputs[1].sizes()))
        in[j] = apply_mask(in[j], mask);
    }
    for (size_t k = 0; k < spec.options.size(); ++k) options[k] = num<Tensor>(spec.options[k]);
    Result<Tensor, F::inputs> r = F::template eval<Tensor>(in, options);
    return use(r.value, at::TensorList(r.grad, F::inputs));
  });
}

}  // namespace

Tensor rowwise_composite(const Spec& spec, at::TensorList inputs, const OptTensor& mask) {
  return evaluate(spec, inputs, mask, [&](const Tensor& value, at::TensorList) {
    const Tensor v = apply_mask(value, mask);
    std::vector<int64_t> event;
    for (int64_t d = inputs[1].dim() - inputs[0].dim() + 1; d < inputs[1].dim(); ++d)
      event.push_back(d);
    return event.empty() ? v : v.sum(event);
  });
}

std::vector<Tensor> rowwise_composite_grads(const Spec& spec, at::TensorList inputs,
                                            const OptTensor& mask, const Tensor& factor,
                                            const Needs& needs) {
  return evaluate(spec, inputs, mask, [&](const Tensor&, at::TensorList grads) {
    const Tensor f = unsqueeze_event(factor, inputs[0].dim() - 1);
    std::vector<Tensor> out;
    for (size_t j = 0; j < needs.size(); ++j)
      if (needs[j]) out.push_back(reduce_to(apply_mask(grads[j] * f, mask), inputs[j]));
    return out;
  });
}

}  // namespace fastvae
