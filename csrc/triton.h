// The door to the Triton kernels, which are Python: fastvae/_triton.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "common.h"

namespace fastvae::triton {

// CUDA (and ROCm) tensors; CPU tensors where this thread has asked for Triton's interpreter.
bool serves(const Tensor& t);

// Sends this thread's CPU tensors to the interpreter, or no longer; returns what was before.
bool set_interpreting(bool on);
class Interpret {
 public:
  explicit Interpret(bool on) : before_(set_interpreting(on)) {}
  ~Interpret() { set_interpreting(before_); }
  Interpret(const Interpret&) = delete;
  Interpret& operator=(const Interpret&) = delete;

 private:
  bool before_;
};

// A backward runs where its forward did, whatever the thread asks for by then.
void remember(torch::autograd::AutogradContext* ctx);
bool remembered(torch::autograd::AutogradContext* ctx);

// What fastvae/_triton/__init__.py has, under the same names; matrices are [rows, cols] views.
void rowwise(const char* family, const std::vector<Tensor>& inputs, const OptTensor& mask,
             const OptTensor& weight, at::ArrayRef<double> options, double scale, int64_t batch,
             const Tensor& value, const std::vector<Tensor>& grads, const Needs& needs);
void sample_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed, int64_t num_samples,
                    int64_t sample_offset, const OptTensor& sample_index, const Tensor& z,
                    const OptTensor& kl);
void sample_backward(const OptTensor& grad_z, const OptTensor& grad_kl, const Tensor& mu,
                     const Tensor& logvar, const Tensor& seed, int64_t num_samples,
                     int64_t sample_offset, const OptTensor& sample_index, const Tensor& grad_mu,
                     const Tensor& grad_logvar);
void elbo_reduce(const Tensor& log_likelihood, const Tensor& kl, const OptTensor& weight,
                 double beta, double scale, const Tensor& loss, const Tensor& log_likelihood_out,
                 const Tensor& kl_out);
void scale_grad(const Tensor& grad, const Tensor& factor);

}  // namespace fastvae::triton
