// The operators' schemas.
#include <torch/library.h>

TORCH_LIBRARY(fastvae, m) {
  // Dimension 0 is the batch. `needs` says which gradients to make: [x, parameters...] or
  // [mu, logvar, prior mu, prior logvar].
  m.def("seed(Tensor like, Generator? generator=None) -> Tensor",
        {at::Tag::nondeterministic_seeded});
  m.def(
      "noise(Tensor seed, SymInt[] size, SymInt num_samples, SymInt sample_offset, "
      "Tensor? sample_index=None) -> Tensor");
  m.def(
      "noise_each(Tensor seeds, SymInt[] size, SymInt num_samples, SymInt sample_offset, "
      "Tensor? sample_index=None) -> Tensor");
  m.def(
      "rsample(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples=None, "
      "SymInt sample_offset=0, Tensor? sample_index=None) -> Tensor");
  m.def(
      "rsample_kl(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples=None, "
      "SymInt sample_offset=0, Tensor? sample_index=None) -> (Tensor z, Tensor kl)");
  m.def(
      "rsample_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor seed, "
      "SymInt? num_samples, SymInt sample_offset, Tensor? sample_index=None) -> (Tensor grad_mu, "
      "Tensor grad_logvar)");
  m.def(
      "kl_divergence(Tensor mu, Tensor logvar, Tensor? prior_mu=None, Tensor? prior_logvar=None, "
      "Tensor? mask=None) -> Tensor");
  m.def(
      "log_likelihood(Tensor x, Tensor[] params, str family, float[] options, Tensor? mask=None) "
      "-> Tensor");
  m.def(
      "row_forward(Tensor x, Tensor[] params, str family, float[] options, Tensor? "
      "mask, Tensor? weight, float scale, bool[5] needs) -> (Tensor value, Tensor[] grads)");
  // The same in plain PyTorch, implemented by the Python package.
  m.def("row_composite(Tensor[] inputs, str family, float[] options, Tensor? mask=None) -> Tensor");
  m.def(
      "rsample_composite(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples, SymInt "
      "sample_offset, Tensor? sample_index=None) -> Tensor");
  m.def(
      "elbo(Tensor x, Tensor[] params, Tensor kl, str family, float[] options, Tensor? mask, "
      "Tensor? weight, float beta, str reduction) -> (Tensor loss, Tensor log_likelihood, Tensor "
      "kl_out, Tensor rows)");
  // Where a gradient is asked for, it overwrites the parameter that it belongs to.
  m.def(
      "elbo_inplace(Tensor x, Tensor(a!)[] params, Tensor kl, str family, float[] options, Tensor? "
      "mask, Tensor? weight, float beta, str reduction) -> (Tensor loss, Tensor log_likelihood, "
      "Tensor kl_out, Tensor rows)");
  m.def(
      "elbo_reduce(Tensor log_likelihood, Tensor kl, Tensor? weight, float beta, str reduction) "
      "-> (Tensor loss, Tensor log_likelihood_out, Tensor kl_out)");
  m.def("count_nonfinite(Tensor(a!) state, Tensor rows, Tensor kl, Tensor? weight=None) -> ()");
}
