// What the operators stand on and how Python reaches them, compiled as one file like
// unity_operators.cpp, beside it.
#include "common.cpp"
#include "device_cpu.cpp"
#if defined(FASTVAE_CUDA)
#include "device_cuda.cpp"
#endif
#include "memory.cpp"
#include "nonfinite.cpp"
#include "ops.cpp"
#include "python.cpp"
#include "triton.cpp"
