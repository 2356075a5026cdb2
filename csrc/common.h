// What the operators share: routing, memory-safety checks, and tensors seen as row matrices.
#pragma once

#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "memory.h"

namespace fastvae {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using Needs = std::vector<bool>;

// --- routing ---

// A functorch transform is active, or an input carries a forward-mode tangent: the composite of
// differentiable ATen ops must run, since the fused Functions have neither vmap nor jvp.
bool needs_composite(at::TensorList inputs);

// The same for a backward: also where a graph of the gradients is wanted (double backward).
bool needs_composite_backward(at::TensorList upstream, at::TensorList inputs);

// Ordinary eager execution: no trace is broken by what depends on values.
inline bool is_plain(const Tensor& t) {
  return !t.unsafeGetTensorImpl()->is_python_dispatch() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

inline bool any_requires_grad(at::TensorList tensors) {
  for (const Tensor& t : tensors)
    if (t.defined() && t.requires_grad()) return true;
  return false;
}

// An operator through the dispatcher: ordinarily a call, under tracing a node.
template <class Fn>
auto typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Fn>();
}

// --- dtypes ---

inline at::ScalarType compute_type(at::ScalarType t) {
  return t == at::kDouble ? at::kDouble : at::kFloat;
}

DType dtype_of(const Tensor& t);

// --- checks: what memory safety needs; functional.py explains the rest to the user ---

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on ", like.device(), ", got ",
                    t.device());
}

inline void check_dense(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized(), name,
                   " must be a dense tensor, got layout ", t.layout(), " and dtype ",
                   t.scalar_type());
}

inline void check_same_shape(const Tensor& a, const char* a_name, const Tensor& b,
                             const char* b_name) {
  TORCH_CHECK_VALUE(a.sym_sizes() == b.sym_sizes(), a_name, " and ", b_name,
                    " must have the same shape, got ", a.sym_sizes(), " and ", b.sym_sizes());
}

inline void check_floating(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble ||
                       t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16,
                   name, " must be float64, float32, bfloat16 or float16, got ", t.scalar_type());
}

// --- tensors as matrices ---

// Keeps alive the contiguous copies that operands may need.
struct RowOperand {
  Tensor storage;
  Operand operand;
};

// The operand as a view [period, cols], or with planes [period, planes, cols]; a column stride of 0
// repeats one element.
inline Tensor matrix(const RowOperand& r, int64_t cols, bool planes = false) {
  const Operand& o = r.operand;
  if (planes)
    return r.storage.as_strided({o.period, o.planes, cols},
                                {o.row_stride, o.plane_stride, o.col_stride});
  return r.storage.as_strided({o.period, cols}, {o.row_stride, o.col_stride});
}

// The event dimensions, those behind the first `lead`, in the order in which they lie densely in
// memory (channels_last has its channels innermost); empty where that is their own order, or where
// there is none. A row's elements may come in any order that its operands share.
std::vector<int64_t> memory_order(const Tensor& t, int64_t lead);

// `t` with its last dimensions, as many as there are in `order`, so permuted.
Tensor permute_event(const Tensor& t, at::IntArrayRef order);

// A tensor of these sizes whose event dimensions lie in that order.
Tensor empty_event(at::IntArrayRef sizes, at::IntArrayRef order, at::ScalarType type,
                   at::Device device);

// `t` with its first `lead` dimensions as rows, the rest as columns. No copy where the columns are
// contiguous or one repeated element; nor, where the kernel can step, where they are few and lie
// at equal distances.
RowOperand as_rows(const Tensor& t, int64_t lead, bool can_step = false);

// `t` [rows..., planes, *event] with its first `lead` dimensions as rows and those of the event, in
// that order, as columns. No copy where rows and columns each have one stride.
RowOperand as_sites(const Tensor& t, int64_t lead, at::IntArrayRef event_order);

// out[r] = Σ over the parts of r, in order: partial[r][part], or of a column partial[part][r].
void sum_parts(const double* partial, int64_t parts, const Tensor& out, bool by_column = false);

inline int64_t product(at::IntArrayRef sizes) { return c10::multiply_integers(sizes); }

// Sums a gradient to the shape of the input it belongs to, in that input's dtype.
inline Tensor reduce_to(const Tensor& grad, const Tensor& input) {
  if (grad.sym_sizes() == input.sym_sizes() && grad.scalar_type() == input.scalar_type())
    return grad;
  return at::sum_to(grad, input.sym_sizes()).to(input.scalar_type());
}

// Calls fn with a pointer to the elements of a contiguous floating tensor.
template <class Fn>
void with_values(const Tensor& t, Fn&& fn) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.scalar_type(), "fastvae",
                                  [&] { fn(t.const_data_ptr<scalar_t>()); });
}

inline double scalar_value(const Tensor& t) {
  double value = 0;
  with_values(t, [&](const auto* p) { value = static_cast<double>(*p); });
  return value;
}

// A dense tensor whose rows lie one behind the other, as a matrix; the order within a row is that
// of memory.
inline Tensor dense_rows(const Tensor& t, int64_t rows) {
  const int64_t cols = rows ? t.numel() / rows : 0;
  return t.as_strided({rows, cols}, {cols, 1});
}

// [rows...] with `n` trailing dimensions of one, to multiply [rows..., event...].
inline Tensor unsqueeze_event(const Tensor& t, int64_t n) {
  if (t.dim() == 0 || n == 0) return t;
  auto sizes = t.sym_sizes().vec();
  sizes.resize(sizes.size() + n, 1);
  return t.view_symint(sizes);
}

// One value for each row of x, of a scalar or of what has them already.
inline Tensor per_row(const Tensor& t, const Tensor& x) { return t.expand_symint({x.sym_size(0)}); }

}  // namespace fastvae
