// What every formula shares. A formula is a struct with its name, a table of inputs, its number of
// options, and a function on lanes V: values in, value and gradients out. It sees no pointer, mask
// or dtype. The vocabulary it calls (exp, log1p, select, ...) is included before it:
// cpu/compounds.h.
#pragma once

#include <iterator>

#if defined(__CUDACC__)
#define FASTVAE_INLINE __host__ __device__ __forceinline__
#else
#define FASTVAE_INLINE inline __attribute__((always_inline))
#endif

namespace fastvae {

// Where an input must lie; the loop checks it while it has the value in a register.
enum class Domain { real, unit, nonnegative, positive, count };
// No derivative by data exists: none is computed.
enum class Role { data, parameter };

struct Input {
  const char* name;
  Domain domain = Domain::real;
  Role role = Role::parameter;
};

template <class F>
constexpr int inputs_of = std::size(F::inputs);

// Whether lanes V are float64.
template <class V>
constexpr bool precise = sizeof(typename V::value_type) == 8;

// A formula's value per element and its derivative with respect to each of its N inputs.
template <class V, int N>
struct Result {
  V value;
  V grad[N];
  // ln(1 + gain) − ln(1 + odds), odds and gain ≥ 0, belongs to the value: a sum of such logarithms
  // is one logarithm of a product, which the loop takes at its end. Read where `F::log_odds` and
  // `F::log_gain` are declared, gain ≤ 1.
  V odds{}, gain{};
};

// A formula that most elements need little of, counts that are mostly 0, declares `rare`: how many
// inputs, from the first on, the others' formula takes and gives the gradients of. Its own `eval`
// is right where the first input is 0, and adds nothing to those inputs' share of the value
// elsewhere. The loop packs the others and calls F::eval_rare<V, kind>(in, options), kind 0 up to
// F::rare_limit, 1 beyond; its value is added, its gradients stand in place of eval's.
template <class F>
constexpr int rare_inputs = [] {
  if constexpr (requires { F::rare; })
    return F::rare;
  else
    return 0;
}();

}  // namespace fastvae
