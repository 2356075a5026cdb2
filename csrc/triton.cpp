#include "triton.h"

#include <c10/core/DeviceGuard.h>
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "device_kernels.h"

namespace fastvae::triton {
namespace {

namespace py = pybind11;

thread_local bool to_triton = false;

// Calls fastvae._triton.`name` under the tensor's own device. Asking for the GIL of a Python that
// isn't there, as in AOTInductor's C++ runner, would end the process.
template <class... Args>
void call(const char* name, const Tensor& on, Args&&... args) {
  TORCH_CHECK(Py_IsInitialized(), "fastvae: the kernels for ", on.device().type(),
              " tensors are Python's (Triton), and no Python runs in this process: serve the model "
              "on the CPU, or from Python");
  const c10::DeviceGuard device(on.device());
  const py::gil_scoped_acquire gil;
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> kernels;
  kernels.call_once_and_store_result([] { return py::module_::import("fastvae._triton"); });
  kernels.get_stored().attr(name)(std::forward<Args>(args)...);
}

OptTensor optional(const RowOperand& r, int64_t cols) {
  return r.storage.defined() ? OptTensor(matrix(r, cols)) : std::nullopt;
}

unsigned rowwise(const RowTask& task) {
  if (task.rows == 0) return no_rows(task);
  const auto empty_like = [&](const Tensor& t) {
    return at::empty({task.rows, task.cols}, t.options());
  };
  std::vector<Tensor> views, grads;
  Needs needs;
  std::vector<std::pair<Tensor, Tensor>> summed;  // over the rows: the sum, of what
  for (const RowOperand& in : task.in)
    if (in.storage.defined()) views.push_back(matrix(in, task.cols, task.sites));
  for (size_t j = 0; j < views.size(); ++j) {
    const auto& [out, along, planes_last] = task.grads[j];
    needs.push_back(out.defined());
    if (!out.defined()) continue;
    grads.push_back(along == Along::columns ? empty_like(out) : dense_rows(out, task.rows));
    if (task.sites) {
      const int64_t planes = task.in[j].operand.planes;
      grads.back() = planes_last ? grads.back().view({task.rows, task.cols, planes}).transpose(1, 2)
                                 : grads.back().view({task.rows, planes, task.cols});
    }
    if (along == Along::rows) grads.back() = out.view({task.rows});
    if (along == Along::columns) summed.emplace_back(dense_rows(out, 1)[0], grads.back());
  }
  OptTensor mask = optional(task.mask, task.cols);
  if (mask) mask = mask->view(at::kByte);
  call(task.sites ? "sites" : "rowwise", task.value, formula_name(task.spec.formula), views, mask,
       optional(task.weight, 1), task.spec.options, task.scale, task.batch,
       task.value.view({task.rows}), grads, needs);
  for (auto& [sum, dense] : summed) at::sum_out(sum, dense, 0);
  return 0;
}

void sample(const SampleForward& t) {
  if (t.batch == 0) return;
  call("sample_forward", t.z, matrix(t.mu, t.cols), matrix(t.logvar, t.cols), t.seed, t.draws,
       t.offset, t.index, t.z.view({t.draws * t.batch, t.cols}),
       t.kl.defined() ? OptTensor(t.kl) : std::nullopt);
}

void sample_backward(const SampleBackward& t) {
  if (t.grad_mu.numel() == 0) return;
  call("sample_backward", t.grad_mu, optional(t.grad_z, t.cols), optional(t.grad_kl, 1),
       matrix(t.mu, t.cols), matrix(t.logvar, t.cols), t.seed, t.draws, t.offset, t.index,
       t.grad_mu.view({t.batch, t.cols}), t.grad_logvar.view({t.batch, t.cols}));
}

void elbo_reduce(const ReduceTask& t) {
  call("elbo_reduce", t.kl, t.log_likelihood, t.kl, t.weight, t.beta, t.scale, t.loss_out,
       t.log_likelihood_out, t.kl_out);
}

void scale_rows(const Tensor& grad, const Tensor& factor) {
  if (grad.numel() > 0) call("scale_grad", grad, grad, factor);
}

}  // namespace

bool asked() { return to_triton; }

bool ask(bool on) { return std::exchange(to_triton, on); }

void remember(torch::autograd::AutogradContext* ctx) {
  if (to_triton) ctx->saved_data["triton"] = true;
}
bool remembered(torch::autograd::AutogradContext* ctx) {
  return ctx->saved_data.count("triton") != 0;
}

}  // namespace fastvae::triton

namespace fastvae {

const DeviceKernels triton_device = {false,
                                     triton::rowwise,
                                     triton::sample,
                                     triton::sample_backward,
                                     triton::elbo_reduce,
                                     triton::scale_rows};

}  // namespace fastvae
