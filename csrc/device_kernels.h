// What the operators ask of a device: one table each, found by a tensor. Tensors in a task are
// checked; those that aren't there, or not wanted, are undefined.
#pragma once

#include "rowwise.h"

namespace fastvae {

// A formula's rows, as matrices [rows, cols] with the columns in an order that all share; what has
// planes is [rows, planes, cols].
struct RowTask {
  struct Gradient {
    Tensor out;  // both: dense, rows one behind the other; rows: [rows, 1]; columns: [1, cols]
    Along along = Along::both;
    bool planes_last = false;  // of sites: [rows, cols, planes], else [rows, planes, cols]
  };
  const Spec& spec;
  bool sites;                 // of a formula with planes
  int64_t rows, cols, batch;  // row r is one of sample r mod batch
  double scale;               // of the gradients, as is the row's weight
  RowOperand in[max_inputs], mask, weight;
  Tensor value;  // [rows]
  Gradient grads[max_inputs];
};

// Rows of the latents, and which of the stream's normals they draw.
struct SampleTask {
  int64_t batch, cols, draws, offset;
  Tensor seed;
  OptTensor index;  // contiguous
  RowOperand mu, logvar;
};
struct SampleForward : SampleTask {
  Tensor z, kl;  // [draws, batch, cols] in memory, [batch]
};
struct SampleBackward : SampleTask {
  RowOperand grad_z, grad_kl;
  Tensor grad_mu, grad_logvar;
};

// The loss scale · w_b (β kl_b − mean_k ll_kb) and its two parts, of each sample or their sum.
struct ReduceTask {
  Tensor log_likelihood, kl;  // [batch] or [K, batch], and [batch], contiguous
  OptTensor weight;           // [batch], contiguous
  double beta, scale;
  Tensor loss_out, log_likelihood_out, kl_out;  // [batch], or scalars: the sums
};

struct DeviceKernels {
  bool host;  // what its tensors hold is known without waiting; rows may step through memory
  unsigned (*rowwise)(const RowTask&);  // bit j: input j leaves its domain, as far as it was looked
  void (*sample)(const SampleForward&);
  void (*sample_backward)(const SampleBackward&);
  void (*elbo_reduce)(const ReduceTask&);
  // grad [rows, cols] *= factor [rows], but 0 where the factor is: β may be 0, the KL infinite.
  void (*scale_rows)(const Tensor& grad, const Tensor& factor);
};

extern const DeviceKernels cpu_device, cuda_device, triton_device;

// Whether the kernels in CUDA C++ were compiled for that device; where they are built.
bool cuda_serves(int64_t device);

// Where this thread asked for Triton, that is Triton's, CPU tensors going to its interpreter; else
// the CPU's, or of CUDA tensors those in CUDA C++, and Triton's where they are not built for the
// device.
const DeviceKernels& kernels_for(const Tensor& t);

// What is summed over no rows is 0.
inline unsigned no_rows(const RowTask& task) {
  for (const auto& grad : task.grads)
    if (grad.out.defined() && grad.along == Along::columns) grad.out.zero_();
  return 0;
}

}  // namespace fastvae
