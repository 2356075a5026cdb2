// Calls an operator when Python is over, as a process without one would; see test_processes.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones.h>

#include <cstdio>

extern "C" void call_operator() {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastvae::kl_divergence", "");
  torch::jit::Stack stack{at::ones({2, 3}), at::ones({2, 3}), {}, {}, {}};
  try {
    op.callBoxed(stack);
    std::puts("it ran");
  } catch (const c10::Error& error) {
    std::puts(error.what_without_backtrace());
  }
  std::fflush(stdout);
}
