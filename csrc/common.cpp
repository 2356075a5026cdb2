#include "common.h"

#include <torch/csrc/autograd/functions/utils.h>

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
    default:
      TORCH_CHECK_TYPE(false, "fastvae has no kernel for dtype ", t.scalar_type());
  }
}

namespace {

bool columns_contiguous(const Tensor& t, int64_t lead) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= lead; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

bool columns_repeated(const Tensor& t, int64_t lead) {
  for (int64_t d = lead; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != 0) return false;
  return true;
}

// The lead dimensions as one: its stride, if they have one.
std::optional<int64_t> row_stride(const Tensor& t, int64_t lead) {
  int64_t stride = 0, rows = 1;
  for (int64_t d = lead - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (rows == 1)
      stride = t.stride(d);
    else if (t.stride(d) != stride * rows)
      return std::nullopt;
    rows *= t.size(d);
  }
  return stride;
}

}  // namespace

void sum_chunks(const double* partial, int64_t chunks, const Tensor& out) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "fastvae_rows", [&] {
    auto* p = out.mutable_data_ptr<scalar_t>();
    for (int64_t r = 0; r < out.numel(); ++r) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += *partial++;
      p[r] = static_cast<scalar_t>(sum);
    }
  });
}

RowOperand as_rows(const Tensor& t, int64_t lead) {
  RowOperand r{t, {}};
  auto stride = row_stride(t, lead);
  r.operand.per_row = columns_repeated(t, lead);
  if (!stride || !(r.operand.per_row || columns_contiguous(t, lead))) {
    r.storage = t.contiguous();
    r.operand.per_row = columns_repeated(r.storage, lead);  // still so where the columns are one
    stride = row_stride(r.storage, lead);
  }
  r.operand.data = r.storage.const_data_ptr();
  r.operand.dtype = dtype_of(t);
  r.operand.row_stride = *stride;
  r.operand.period = std::max<int64_t>(1, product(t.sizes().slice(0, lead)));
  return r;
}

}  // namespace fastvae
