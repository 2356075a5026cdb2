#include "triton.h"

#include <c10/core/DeviceGuard.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace fastvae::triton {
namespace {

namespace py = pybind11;

thread_local bool interpret = false;

// Calls fastvae._triton.`name` under the tensor's own device. Asking for the GIL of a Python that
// isn't there, as in AOTInductor's C++ runner, would end the process.
template <class... Args>
void call(const char* name, const Tensor& on, Args&&... args) {
  TORCH_CHECK(Py_IsInitialized(), "fastvae: the kernels for ", on.device().type(),
              " tensors are Python's (Triton), and no Python runs in this process: serve the model "
              "on the CPU, or from Python");
  const c10::DeviceGuard device(on.device());
  const py::gil_scoped_acquire gil;
  py::module_::import("fastvae._triton").attr(name)(std::forward<Args>(args)...);
}

}  // namespace

bool serves(const Tensor& t) { return t.is_cuda() || interpret; }

bool set_interpreting(bool on) { return std::exchange(interpret, on); }

void remember(torch::autograd::AutogradContext* ctx) {
  if (interpret) ctx->saved_data["interpret"] = true;
}
bool remembered(torch::autograd::AutogradContext* ctx) {
  return ctx->saved_data.count("interpret") != 0;
}

void rowwise(const char* family, const std::vector<Tensor>& inputs, const OptTensor& mask,
             const OptTensor& weight, at::ArrayRef<double> options, double scale, int64_t batch,
             const Tensor& value, const std::vector<Tensor>& grads, const Needs& needs) {
  call("rowwise", value, family, inputs, mask, weight, options.vec(), scale, batch, value, grads,
       needs);
}

void sample_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed, int64_t num_samples,
                    int64_t sample_offset, const OptTensor& sample_index, const Tensor& z,
                    const OptTensor& kl) {
  call("sample_forward", mu, mu, logvar, seed, num_samples, sample_offset, sample_index, z, kl);
}

void sample_backward(const OptTensor& grad_z, const OptTensor& grad_kl, const Tensor& mu,
                     const Tensor& logvar, const Tensor& seed, int64_t num_samples,
                     int64_t sample_offset, const OptTensor& sample_index, const Tensor& grad_mu,
                     const Tensor& grad_logvar) {
  call("sample_backward", mu, grad_z, grad_kl, mu, logvar, seed, num_samples, sample_offset,
       sample_index, grad_mu, grad_logvar);
}

void elbo_reduce(const Tensor& log_likelihood, const Tensor& kl, const OptTensor& weight,
                 double beta, double scale, const Tensor& loss, const Tensor& log_likelihood_out,
                 const Tensor& kl_out) {
  call("elbo_reduce", kl, log_likelihood, kl, weight, beta, scale, loss, log_likelihood_out,
       kl_out);
}

void scale_grad(const Tensor& grad, const Tensor& factor) {
  call("scale_grad", grad, grad, factor);
}

}  // namespace fastvae::triton
