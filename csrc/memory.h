// Memory for large outputs on the CPU, kept for the next call once nobody holds it any more.
//
// Fresh memory costs a page fault per 4 KiB, more than a kernel needs to fill it, and a training
// loop asks for the same sizes at every step. What is kept here is memory that its tensor's storage
// has given back: nothing that a user still holds, by whatever alias, can be handed out again.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastvae {

// A dense tensor on `device`, not initialized. For the CPU without the dispatcher, which costs more
// than the allocation.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type, at::Device device);

// Frees what is kept; returns how many bytes that was.
size_t empty_cache();

}  // namespace fastvae
