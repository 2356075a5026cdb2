// The door to the Triton kernels, which are Python: fastvae/_triton. Their table: device_kernels.h.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace fastvae::triton {

// Whether this thread's CPU tensors go to Triton's interpreter.
bool interpreting();
// Sends them there, or no longer; returns what was before.
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

}  // namespace fastvae::triton
