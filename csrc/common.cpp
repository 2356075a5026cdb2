#include "common.h"

#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <numeric>

namespace fastvae {

bool needs_composite(at::TensorList inputs) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (functorch) {
    try {
      functorch->checkSupportsCppAutogradFunction();  // throws inside a transform
    } catch (const c10::Error&) {
      return true;
    }
  }
  // is_grads_batched= wraps the upstream gradients alone.
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::Batched,
                                         c10::DispatchKey::FuncTorchGradWrapper});
  for (const Tensor& t : inputs)
    if (t.defined() && (t._fw_grad(/*level=*/0).defined() || t.key_set().has_any(wrapped)))
      return true;
  return false;
}

bool needs_composite_backward(at::TensorList upstream, at::TensorList inputs) {
  const bool graph =
      at::GradMode::is_enabled() && (any_requires_grad(upstream) || any_requires_grad(inputs));
  return graph || needs_composite(upstream) || needs_composite(inputs);
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::f64;
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kByte:
    case at::kBool:
      return DType::u8;
    case at::kChar:
      return DType::i8;
    case at::kShort:
      return DType::i16;
    case at::kInt:
      return DType::i32;
    case at::kLong:
      return DType::i64;
    default:
      TORCH_CHECK_TYPE(false, "fastvae has no kernel for dtype ", t.scalar_type());
  }
}

namespace {

// The dimensions [first, last) as one: its stride, if they have one; 0 where they hold one element.
std::optional<int64_t> merged_stride(const Tensor& t, int64_t first, int64_t last) {
  int64_t stride = 0, count = 1;
  for (int64_t d = last - 1; d >= first; --d) {
    if (t.size(d) == 1) continue;
    if (count == 1)
      stride = t.stride(d);
    else if (t.stride(d) != stride * count)
      return std::nullopt;
    count *= t.size(d);
  }
  return stride;
}

}  // namespace

std::vector<int64_t> memory_order(const Tensor& t, int64_t lead) {
  if (merged_stride(t, lead, t.dim())) return {};
  std::vector<int64_t> order(t.dim() - lead);
  std::iota(order.begin(), order.end(), lead);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  for (int64_t& d : order) d -= lead;
  return merged_stride(permute_event(t, order), lead, t.dim()) ? order : std::vector<int64_t>();
}

Tensor permute_event(const Tensor& t, at::IntArrayRef order) {
  if (order.empty()) return t;
  const int64_t lead = t.dim() - static_cast<int64_t>(order.size());
  std::vector<int64_t> dims(t.dim());
  std::iota(dims.begin(), dims.begin() + lead, 0);
  for (size_t i = 0; i < order.size(); ++i) dims[lead + i] = lead + order[i];
  return t.permute(dims);
}

Tensor empty_event(at::IntArrayRef sizes, at::IntArrayRef order, at::ScalarType type,
                   at::Device device) {
  if (order.empty()) return empty(sizes, type, device);
  const int64_t lead = static_cast<int64_t>(sizes.size() - order.size());
  std::vector<int64_t> stored(sizes.begin(), sizes.begin() + lead), back(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    stored.push_back(sizes[lead + order[i]]);
    back[order[i]] = static_cast<int64_t>(i);
  }
  return permute_event(empty(stored, type, device), back);
}

void sum_parts(const double* partial, int64_t parts, const Tensor& out, bool by_column) {
  const int64_t count = out.numel();
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "fastvae_rows", [&] {
    auto* p = out.mutable_data_ptr<scalar_t>();
    for (int64_t r = 0; r < count; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < parts; ++c)
        sum += by_column ? partial[c * count + r] : partial[r * parts + c];
      p[r] = static_cast<scalar_t>(sum);
    }
  });
}

RowOperand as_rows(const Tensor& t, int64_t lead, bool can_step) {
  RowOperand r{t, {}};
  const int64_t rows = product(t.sizes().slice(0, lead)), cols = product(t.sizes().slice(lead));
  auto stride = merged_stride(t, 0, lead), step = merged_stride(t, lead, t.dim());
  const bool as_it_lies = step && (*step == 0 || *step == 1 || (can_step && cols <= short_row));
  if (!stride || !as_it_lies) {
    // ATen transposes matrices in blocks, other tensors element by element.
    r.storage = (stride && step ? t.as_strided({rows, cols}, {*stride, *step}) : t).contiguous();
    stride = cols;
    step = cols == 1 ? 0 : 1;  // of a column, one element serves the row
  }
  r.operand.data = r.storage.const_data_ptr();
  r.operand.dtype = dtype_of(t);
  r.operand.row_stride = rows == 1 ? 0 : *stride;  // every row is it
  r.operand.col_stride = *step;
  r.operand.period = std::max<int64_t>(1, rows);
  return r;
}

RowOperand as_sites(const Tensor& t, int64_t lead, at::IntArrayRef event_order) {
  RowOperand r{permute_event(t, event_order), {}};
  const auto row_stride = [&] { return merged_stride(r.storage, 0, lead); };
  const auto step = [&] { return merged_stride(r.storage, lead + 1, t.dim()); };
  if (!row_stride() || !step()) r.storage = r.storage.contiguous();
  r.operand.data = r.storage.const_data_ptr();
  r.operand.dtype = dtype_of(t);
  r.operand.row_stride = *row_stride();
  r.operand.col_stride = *step();
  r.operand.period = std::max<int64_t>(1, product(t.sizes().slice(0, lead)));
  r.operand.planes = t.size(lead);
  r.operand.plane_stride = r.storage.stride(lead);
  return r;
}

}  // namespace fastvae
