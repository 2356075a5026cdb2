// What every formula shares. A formula is a template on the number type V alone: a SIMD vector in
// the CPU loop, a float in a CUDA kernel, an at::Tensor in the composite that serves double
// backward and functorch. The vocabulary it calls (exp, log_logistic, exp_factor, ...) is included
// before it: cpu/vec.h, cuda/math.h or aten_math.h.
#pragma once

#if defined(__CUDACC__)
#define FASTVAE_INLINE __host__ __device__ __forceinline__
#else
#define FASTVAE_INLINE inline __attribute__((always_inline))
#endif

namespace fastvae {

// Where an input must lie; the loop checks it while it has the value in a register.
enum class Domain { real, unit };  // unit: [0, 1]

// A formula's value per element and its derivative with respect to each of its N inputs.
template <class V, int N>
struct Result {
  V value;
  V grad[N];
  // Where `F::log_odds` is true, − ln(1 + odds) belongs to the value, odds ≥ 0: a sum of such
  // logarithms is one logarithm of a product, which the loop takes at its end.
  V odds{};
};

}  // namespace fastvae
