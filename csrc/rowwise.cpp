#include "rowwise.h"

#include <torch/csrc/autograd/autograd.h>

#include <charconv>

#include "device_kernels.h"
#include "formulas/all.h"

namespace fastvae {

const char* formula_name(int formula) {
  const char* name = nullptr;
  with_formula(formula, [&](auto f) { name = decltype(f)::name; });
  return name;
}

std::vector<std::string> likelihood_names() {
  std::vector<std::string> names;
  for_each_formula(Likelihoods{}, [&](int, auto f) { names.push_back(decltype(f)::name); });
  return names;
}

Spec make_spec(c10::string_view family, at::ArrayRef<double> options, size_t inputs) {
  Spec spec;
  for_each_formula(Likelihoods{}, [&](int i, auto f) {
    using F = decltype(f);
    if (family != F::name) return;
    TORCH_CHECK_VALUE(options.size() == F::options, F::name, " takes ", F::options,
                      " options, got ", options.size());
    TORCH_CHECK_VALUE(inputs == inputs_of<F>, F::name, " takes ", inputs_of<F> - 1, " params, got ",
                      inputs - 1);
    spec = {i, options.vec()};
  });
  TORCH_CHECK_VALUE(spec.formula >= 0, "likelihood must be one of ",
                    c10::Join(", ", likelihood_names()), ", got ", family);
  return spec;
}

Spec kl_spec(size_t inputs) {
  return {inputs == 2 ? index_of<StandardKL> : index_of<NormalKL>, {}};
}

bool has_derivative(const Spec& spec, size_t input) {
  bool has = true;
  with_formula(spec.formula,
               [&](auto f) { has = decltype(f)::inputs[input].role == Role::parameter; });
  return has;
}

namespace {

bool is_of_sites(const Spec& spec) {
  bool is = false;
  with_formula(spec.formula, [&](auto f) { is = has_planes<decltype(f)>; });
  return is;
}

}  // namespace

int64_t row_dims(const Spec& spec, at::TensorList inputs) {
  int64_t dims = 0;
  with_formula(spec.formula, [&](auto f) {
    using F = decltype(f);
    const int64_t event = inputs[0].dim() - 1 - (F::inputs[0].planes != 1);
    dims = inputs[1].dim() - event - (F::inputs[1].planes != 1);
  });
  return dims;
}

Along varies_along(const Spec& spec, at::TensorList inputs, size_t j) {
  if (j == 0 || is_of_sites(spec)) return Along::both;
  const Tensor &t = inputs[j], &full = inputs[1];
  const int64_t lead = row_dims(spec, inputs);
  const auto all_one = [&](int64_t first, int64_t last) {
    for (int64_t d = first; d < last; ++d)
      if (t.sym_size(d) != 1) return false;
    return true;
  };
  if (t.sym_sizes() == full.sym_sizes()) return Along::both;
  if (t.dim() == full.dim() && all_one(0, lead) && !all_one(lead, t.dim())) return Along::columns;
  return Along::rows;
}

namespace {

template <class F>
void check_shapes(const Spec& spec, at::TensorList inputs) {
  const Tensor &x = inputs[0], &full = inputs[1];
  const int64_t event = x.dim() - 1, lead = full.dim() - event;
  TORCH_CHECK_VALUE(
      event >= 0 && (lead == 1 || lead == 2) && full.sizes().slice(lead - 1) == x.sizes(),
      F::inputs[0].name, " must have the shape of ", F::inputs[1].name,
      ", with or without a leading sample dimension, got ", x.sizes(), " and ", full.sizes());
  TORCH_CHECK_VALUE(lead == 1 || full.size(0) > 0, F::inputs[1].name,
                    " must hold at least one sample, got ", full.sizes());
  for (int j = 1; j < inputs_of<F>; ++j) {
    const Tensor& t = inputs[j];
    bool per_row = t.numel() == 1 && t.dim() <= full.dim();
    if (!per_row && t.dim() == full.dim()) {
      per_row = t.sizes().slice(0, lead) == full.sizes().slice(0, lead);
      for (int64_t d = lead; d < full.dim(); ++d) per_row = per_row && t.size(d) == 1;
    }
    const bool per_column = t.dim() == full.dim() &&
                            t.sizes().slice(lead) == full.sizes().slice(lead) &&
                            varies_along(spec, inputs, j) == Along::columns;
    TORCH_CHECK_VALUE((j > 1 && (per_row || per_column)) || t.sizes() == full.sizes(),
                      F::inputs[j].name, " must have shape ", full.sizes(),
                      " or be constant along each row or column, got ", t.sizes());
  }
}

// x [B, *event], every parameter [rows..., planes, *event]; what has one plane has no dimension for
// it.
template <class F>
void check_site_shapes(const Spec& spec, at::TensorList inputs) {
  const Tensor& x = inputs[0];
  const int64_t of_x = F::inputs[0].planes != 1, lead = row_dims(spec, inputs);
  TORCH_CHECK_VALUE(x.dim() > of_x && (lead == 1 || lead == 2), F::inputs[1].name,
                    " must have a dimension for its planes behind the batch, and may have a sample "
                    "dimension before it, got ",
                    inputs[1].sizes(), " beside ", F::inputs[0].name, " ", x.sizes());
  std::vector<int64_t> rows = inputs[1].sizes().slice(0, lead).vec();
  TORCH_CHECK_VALUE(lead == 1 || rows[0] > 0, F::inputs[1].name,
                    " must hold at least one sample, got ", inputs[1].sizes());
  rows.back() = x.size(0);
  for (int j = 0; j < inputs_of<F>; ++j) {
    const auto [name, domain, role, planes] = F::inputs[j];
    const auto sizes = inputs[j].sizes();
    std::vector<int64_t> wanted = rows;
    if (j == 0) wanted = {x.size(0)};
    const size_t at = wanted.size();
    const bool own = planes == 0 && sizes.size() > at && sizes[at] > 0;
    if (planes != 1) wanted.push_back(own ? sizes[at] : std::max(planes, 1));
    for (const int64_t n : x.sizes().slice(1 + of_x)) wanted.push_back(n);
    TORCH_CHECK_VALUE(sizes == at::IntArrayRef(wanted), name, " must have shape ",
                      at::IntArrayRef(wanted), planes == 0 ? " with any number of planes" : "",
                      ", got ", sizes);
  }
}

void check_inputs(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                  const OptTensor& weight) {
  with_formula(spec.formula, [&](auto f) {
    using F = decltype(f);
    const Tensor& x = inputs[0];
    for (int j = 0; j < inputs_of<F>; ++j) {
      const auto [name, domain, role, planes] = F::inputs[j];
      check_dense(inputs[j], name);
      const auto type = inputs[j].scalar_type();
      const bool whole =
          (domain == Domain::count || domain == Domain::index) && at::isIntegralType(type, false);
      if (j > 0 || (!whole && type != at::kByte && type != at::kBool))
        check_floating(inputs[j], name);
    }
    if constexpr (has_planes<F>)
      check_site_shapes<F>(spec, inputs);
    else
      check_shapes<F>(spec, inputs);
    const auto rows = inputs[1].sizes().slice(0, row_dims(spec, inputs));
    if (mask) {
      check_dense(*mask, "mask");
      TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask must be bool, got ",
                       mask->scalar_type());
      check_same_shape(*mask, "mask", F::inputs[0].planes == 1 ? x : x.select(1, 0),
                       F::inputs[0].name);
    }
    if (weight) {
      check_dense(*weight, "weight");
      check_floating(*weight, "weight");
      TORCH_CHECK_VALUE(weight->sizes() == x.sizes().slice(0, 1) || weight->sizes() == rows,
                        "weight must have shape [", x.size(0), "] or that of the rows, got ",
                        weight->sizes());
    }
  });
}

void check_devices(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                   const OptTensor& weight) {
  with_formula(spec.formula, [&](auto f) {
    using F = decltype(f);
    for (int j = 0; j < inputs_of<F>; ++j) check_device(inputs[j], F::inputs[j].name, inputs[1]);
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

// What a value must; `planes` as many as the first parameter has.
std::string words(Domain domain, int64_t planes) {
  switch (domain) {
    case Domain::real:
      return "be a number";
    case Domain::unit:
      return "lie in [0, 1]";
    case Domain::nonnegative:
      return "be at least 0";
    case Domain::positive:
      return "be above 0";
    case Domain::count:
      return "hold counts (0, 1, 2, …)";
    case Domain::index:
      return "hold whole numbers from 0 to " + std::to_string(planes - 1);
  }
  __builtin_unreachable();
}

// What to do about those in [low, high].
const char* way_into(Domain domain, double low, double high, bool data) {
  if (domain == Domain::unit) return way_into_unit(low, high, data);
  if (domain == Domain::index && low < 0) return ": ignore_index leaves such elements out";
  return "";
}

[[noreturn]] void raise_outside(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                                unsigned outside, bool overwritten) {
  with_formula(spec.formula, [&](auto f) {
    using F = decltype(f);
    for (int j = 0; j < inputs_of<F>; ++j) {
      if (!(outside >> j & 1)) continue;
      const auto [name, domain, role, planes] = F::inputs[j];
      const std::string must = c10::str(
          name, " must ", words(domain, inputs[1].size(row_dims(spec, inputs))), " for ", F::name);
      TORCH_CHECK_VALUE(j == 0 || !overwritten, must, "; what came is overwritten by its gradient");
      Tensor t = inputs[j].to(at::kDouble);
      if (mask && planes != 1)
        t = t.masked_select(mask->unsqueeze(1));
      else if (mask)
        t = t.expand(mask->sizes()).masked_select(*mask);
      TORCH_CHECK_VALUE(!t.isnan().any().item<bool>(), must, ", got NaN");
      const double low = t.min().item<double>(), high = t.max().item<double>();
      if (domain == Domain::count && low >= 0) {
        const Tensor parts = t.masked_select(t != t.round());
        TORCH_CHECK_VALUE(parts.numel() == 0, must, ", got ", shortest(parts[0].item<double>()),
                          ": of normalized or logarithmic expression take the raw counts");
      }
      TORCH_CHECK_VALUE(false, must, ", got values in [", shortest(low), ", ", shortest(high), "]",
                        way_into(domain, low, high, j == 0));
    }
  });
  __builtin_unreachable();
}

// How the dimensions behind the rows lie in memory (memory_order), with those of the event alone.
struct Layout {
  std::vector<int64_t> order, event;
  bool sites, planes_last;
};

Layout layout_of(const Spec& spec, const Tensor& full, int64_t lead) {
  Layout layout{memory_order(full, lead), {}, is_of_sites(spec), false};
  if (!layout.sites) {
    layout.event = layout.order;
    return layout;
  }
  // Planes before or behind all of the event's dimensions: else it would have no single stride.
  std::vector<int64_t> wide;
  for (const int64_t d : layout.order)
    if (full.size(lead + d) != 1) wide.push_back(d);
  const auto planes = std::find(wide.begin(), wide.end(), 0);
  layout.planes_last = !wide.empty() && wide.back() == 0;
  const bool first = planes == wide.begin() || planes == wide.end();
  if (!first && !layout.planes_last) layout.order.clear();
  for (const int64_t d : layout.order)
    if (d != 0) layout.event.push_back(d - 1);
  return layout;
}

RowOperand operand_of(const Spec& spec, at::TensorList inputs, size_t j, const Layout& layout,
                      bool can_step) {
  const Tensor &t = inputs[j], &full = inputs[1];
  bool planes = false;
  with_formula(spec.formula, [&](auto f) { planes = decltype(f)::inputs[j].planes != 1; });
  const int64_t lead = j == 0 ? 1 : row_dims(spec, inputs);
  if (planes) return as_sites(t, lead, layout.event);
  if (t.numel() == 1 && t.dim() != full.dim() && !layout.sites)
    return as_rows(t.reshape({1}), 1, can_step);
  const Tensor view = permute_event(t, layout.event);
  return as_rows(view, layout.sites ? lead : t.dim() - inputs[0].dim() + 1, can_step);
}

}  // namespace

RowwiseResult rowwise(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                      const OptTensor& weight, double scale, const Needs& needs, bool overwrite) {
  check_devices(spec, inputs, mask, weight);
  check_inputs(spec, inputs, mask, weight);
  const Tensor &x = inputs[0], &full = inputs[1];
  const int64_t lead = row_dims(spec, inputs);
  const auto row_sizes = full.sizes().slice(0, lead);
  const auto compute = compute_type(full.scalar_type());
  const Layout layout = layout_of(spec, full, lead);
  const DeviceKernels& device = kernels_for(full);

  RowTask task{
      spec,      layout.sites, product(row_sizes), product(full.sizes().slice(lead + layout.sites)),
      x.size(0), scale};
  for (size_t j = 0; j < inputs.size(); ++j)
    task.in[j] = operand_of(spec, inputs, j, layout, device.host);
  if (mask) task.mask = as_rows(permute_event(*mask, layout.event), 1, device.host);
  if (weight) task.weight = as_rows(*weight, weight->dim());

  RowwiseResult result;
  for (size_t j = 0; j < needs.size(); ++j) {
    if (!needs[j]) continue;
    const Along along = varies_along(spec, inputs, j);
    Tensor out;
    if (along == Along::rows) {
      std::vector<int64_t> sizes(row_sizes.begin(), row_sizes.end());
      sizes.resize(full.dim(), 1);
      out = empty(sizes, compute, full.device());
    } else if (along == Along::columns) {
      out = empty_event(inputs[j].sizes(), layout.order, compute, full.device());
    } else if (overwrite && j > 0) {
      out = inputs[j].detach();
    } else {
      const auto sizes = j == 0 ? full.sizes() : inputs[j].sizes();
      out = empty_event(sizes, layout.order, inputs[j].scalar_type(), full.device());
    }
    result.grads.push_back(out);
    task.grads[j] = {std::move(out), along, layout.planes_last};
  }
  task.value = result.value = empty(row_sizes, compute, full.device());
  const unsigned outside = device.rowwise(task);
  if (outside) raise_outside(spec, inputs, mask, outside, overwrite);
  return result;
}

Tensor rowwise_composite(const Spec& spec, at::TensorList inputs, const OptTensor& mask) {
  check_inputs(spec, inputs, mask, {});
  static const auto op =
      typed_op<Tensor(at::TensorList, c10::string_view, at::ArrayRef<double>, const OptTensor&)>(
          "fastvae::row_composite");
  return op.call(inputs, formula_name(spec.formula), spec.options, mask);
}

std::vector<Tensor> composite_grads(const std::function<std::vector<Tensor>(at::TensorList)>& call,
                                    at::TensorList inputs, const Needs& needs,
                                    at::TensorList factors) {
  const bool graph = at::GradMode::is_enabled();
  const at::AutoGradMode enabled(true);
  std::vector<Tensor> aliases(inputs.begin(), inputs.end()), wanted;
  for (size_t j = 0; j < needs.size(); ++j)
    if (needs[j]) wanted.push_back(aliases[j] = inputs[j].view_as(inputs[j]));
  std::vector<Tensor> values = call(aliases), upstream;
  for (size_t i = 0; i < values.size(); ++i)
    upstream.push_back(factors[i].to(values[i].scalar_type()).expand_as(values[i]));
  return torch::autograd::grad(values, wanted, upstream, std::nullopt, graph, true);
}

}  // namespace fastvae
