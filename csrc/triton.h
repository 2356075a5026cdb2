// The door to the Triton kernels, which are Python: fastvae/_triton. Their table: device_kernels.h.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace fastvae::triton {

// Whether this thread's tensors go to Triton: CUDA tensors to its kernels, CPU tensors to its
// interpreter.
bool asked();
// Sends them there, or no longer; returns what was before.
bool ask(bool on);
class Asked {
 public:
  explicit Asked(bool on) : before_(ask(on)) {}
  ~Asked() { ask(before_); }
  Asked(const Asked&) = delete;
  Asked& operator=(const Asked&) = delete;

 private:
  bool before_;
};

// A backward runs where its forward did, whatever the thread asks for by then.
void remember(torch::autograd::AutogradContext* ctx);
bool remembered(torch::autograd::AutogradContext* ctx);

}  // namespace fastvae::triton
