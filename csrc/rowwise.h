// Row formulas on tensors: the fused kernel, and the same formula as a composite of ATen ops.
#pragma once

#include "common.h"

namespace fastvae {

// A formula with its options. Its inputs are a list: [x, parameters...] for a likelihood.
struct Spec {
  Family family;
  std::vector<double> options;
};

// Resolves a likelihood's name; ValueError for an unknown one (which lists the known), or a wrong
// number of options or inputs (x and the parameters).
Spec make_spec(c10::string_view family, at::ArrayRef<double> options, size_t inputs);
std::vector<std::string> likelihood_names();
const char* formula_name(Family family);

struct RowwiseResult {
  Tensor value;               // [rows...]: the sum over the event dimensions
  std::vector<Tensor> grads;  // one per needed input, scaled; [rows..., event...], or
                              // [rows..., 1, ...] for an input that is constant along each row
};

// inputs[0] is [B, *event]; inputs[1] has the full shape, [B, *event] or [K, B, *event]; later ones
// have that or are constant along each row. Gradients are multiplied by
// scale · weight, the latter [B] or [rows...]. With `overwrite`, parameters of the full shape,
// which must be contiguous, are overwritten by their gradients.
RowwiseResult rowwise(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                      const OptTensor& weight, double scale, const Needs& needs,
                      bool overwrite = false);

// The value, differentiable to any order.
Tensor rowwise_composite(const Spec& spec, at::TensorList inputs, const OptTensor& mask);

// The gradients times `factor` (a scalar or [rows...]), reduced to the inputs' shapes, themselves
// differentiable.
std::vector<Tensor> rowwise_composite_grads(const Spec& spec, at::TensorList inputs,
                                            const OptTensor& mask, const Tensor& factor,
                                            const Needs& needs);

}  // namespace fastvae
