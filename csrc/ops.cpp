// The operators' schemas, and the Python module of build facts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include "rowwise.h"
#include "triton.h"

TORCH_LIBRARY(fastvae, m) {
  // Dimension 0 is the batch. `needs` says which gradients to make: [x, parameters...] or
  // [mu, logvar, prior mu, prior logvar].
  m.def("seed(Tensor like, Generator? generator=None) -> Tensor",
        {at::Tag::nondeterministic_seeded});
  m.def("noise(Tensor seed, SymInt[] size, SymInt num_samples, SymInt sample_offset) -> Tensor");
  m.def(
      "rsample(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples=None, "
      "SymInt sample_offset=0) -> Tensor");
  m.def(
      "rsample_kl(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples=None, "
      "SymInt sample_offset=0) -> (Tensor z, Tensor kl)");
  m.def(
      "rsample_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor seed, "
      "SymInt? num_samples, SymInt sample_offset) -> (Tensor grad_mu, Tensor grad_logvar)");
  m.def(
      "kl_divergence(Tensor mu, Tensor logvar, Tensor? prior_mu=None, Tensor? prior_logvar=None) "
      "-> Tensor");
  m.def(
      "kl_divergence_backward(Tensor grad, Tensor mu, Tensor logvar, Tensor? prior_mu, "
      "Tensor? prior_logvar, bool[4] needs) -> Tensor[]");
  m.def(
      "log_likelihood(Tensor x, Tensor[] params, str family, float[] options, Tensor? mask=None) "
      "-> Tensor");
  m.def(
      "log_likelihood_forward(Tensor x, Tensor[] params, str family, float[] options, Tensor? "
      "mask, "
      "Tensor? weight, float scale, bool[4] needs) -> (Tensor value, Tensor[] grads)");
  m.def(
      "elbo(Tensor x, Tensor[] params, Tensor kl, str family, float[] options, Tensor? mask, "
      "Tensor? weight, float beta, str reduction) -> (Tensor loss, Tensor log_likelihood, Tensor "
      "kl_out)");
  // Where a gradient is asked for, it overwrites the parameter that it belongs to.
  m.def(
      "elbo_inplace(Tensor x, Tensor(a!)[] params, Tensor kl, str family, float[] options, Tensor? "
      "mask, Tensor? weight, float beta, str reduction) -> (Tensor loss, Tensor log_likelihood, "
      "Tensor kl_out)");
  m.def(
      "elbo_reduce(Tensor log_likelihood, Tensor kl, Tensor? weight, float beta, str reduction) "
      "-> (Tensor loss, Tensor log_likelihood_out, Tensor kl_out)");
}

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of the fastvae extension; importing it registers torch.ops.fastvae.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FASTVAE_VERSION;
    info["compiler"] = __VERSION__;
    info["torch"] = TORCH_VERSION;
    info["isas"] = fastvae::compiled_isas();
    info["isa"] = fastvae::kernels().isa;
    return info;
  });
  m.def("likelihoods", &fastvae::likelihood_names);
  m.def("empty_cache", &fastvae::empty_cache);
  m.def("interpret", &fastvae::triton::set_interpreting, py::arg("on"),
        "Whether this thread's CPU tensors go to Triton's interpreter; returns what was before.");
  m.def(
      "philox",
      [](const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
        std::array<uint32_t, 4> out{};
        fastvae::kernels().philox(counter.data(), key.data(), out.data());
        return out;
      },
      py::arg("counter"), py::arg("key"),
      "Philox4x32-10 by the vector kernel, for known-answer tests.");
}
