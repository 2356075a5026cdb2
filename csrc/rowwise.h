// Row formulas on tensors: the fused kernel, and the same formula as a composite of ATen ops.
#pragma once

#include <functional>

#include "common.h"

namespace fastvae {

// A formula with its options. Its inputs are a list: [x, parameters...] for a likelihood.
struct Spec {
  int formula = -1;  // its place in Formulas
  std::vector<double> options;
};

// Resolves a likelihood's name; ValueError for an unknown one (which lists the known), or a wrong
// number of options or inputs (x and the parameters).
Spec make_spec(c10::string_view family, at::ArrayRef<double> options, size_t inputs);
std::vector<std::string> likelihood_names();
const char* formula_name(int formula);
// The KL's: of (mu, logvar), or of these and the prior's.
Spec kl_spec(size_t inputs);
// Whether there is one by this input: not by counts.
bool has_derivative(const Spec& spec, size_t input);

// How many dimensions the rows have: those of the first parameter, but for the event's and for its
// planes. [B], or with a sample dimension [K, B].
int64_t row_dims(const Spec& spec, at::TensorList inputs);

// Along what an input has values of its own, and along what its gradient is not summed.
enum class Along { both, rows, columns };
Along varies_along(const Spec& spec, at::TensorList inputs, size_t j);

struct RowwiseResult {
  Tensor value;               // [rows...]: the sum over the event dimensions
  std::vector<Tensor> grads;  // one per needed input, scaled; [rows..., event...], or
                              // [rows..., 1, ...] for an input that is constant along each row, or
                              // [1..., event...] for one that is the same in every row
};

// inputs[0] is [B, *event]; inputs[1] has the full shape, [B, *event] or [K, B, *event]; later ones
// have that or are constant along each row or over the rows. Of a formula with planes each
// parameter has the full shape, with its planes behind the rows: [rows..., planes, *event].
// Gradients are multiplied by scale · weight, the latter [B] or [rows...]. With `overwrite`,
// parameters of the full shape, which must be contiguous, are overwritten by their gradients.
RowwiseResult rowwise(const Spec& spec, at::TensorList inputs, const OptTensor& mask,
                      const OptTensor& weight, double scale, const Needs& needs,
                      bool overwrite = false);

// The value in plain PyTorch (fastvae/_composite.py), differentiable to any order.
Tensor rowwise_composite(const Spec& spec, at::TensorList inputs, const OptTensor& mask);

// The needed gradients of what `call` makes of the inputs, each output times its factor, to which
// it must broadcast; differentiable themselves where grad mode is on. Each input counts as one of
// its own, be it the same tensor as another.
std::vector<Tensor> composite_grads(const std::function<std::vector<Tensor>(at::TensorList)>& call,
                                    at::TensorList inputs, const Needs& needs,
                                    at::TensorList factors);

}  // namespace fastvae
