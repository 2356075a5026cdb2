// What every formula shares. A formula is a struct with its name, a table of inputs, its number of
// options, and a function on lanes V: values in, value and gradients out. It sees no pointer, mask
// or dtype. The vocabulary it calls (exp, log1p, select, ...) is included before it:
// math/compounds.h.
#pragma once

#include <cstdint>
#include <iterator>

#if defined(__CUDACC__)
#define FASTVAE_INLINE __device__ __forceinline__
#else
#define FASTVAE_INLINE inline __attribute__((always_inline))
#endif

namespace fastvae {

// Where an input must lie; the loop checks it while it has the value in a register.
// An index names one of the planes that the first parameter has.
enum class Domain { real, unit, nonnegative, positive, count, index };
// No derivative by data exists: none is computed.
enum class Role { data, parameter };

struct Input {
  const char* name;
  Domain domain = Domain::real;
  Role role = Role::parameter;
  // Values that each element has, in a dimension of the tensor's own before those of the event;
  // 0: as many as the tensor has there (classes, components); 1: one, and no such dimension.
  int planes = 1;
};

template <class F>
constexpr int inputs_of = std::size(F::inputs);

// A formula one of whose inputs has planes is one of sites, a pixel with its classes for example:
//   template <class S> static auto eval(const S& s), which returns the value, of lanes S::V, and
//   s.planes(j)       how many planes input j has, to go through
//   s.in(j, k)        plane k of it
//   s.option(i)       a constant
//   s.grad(j, k, g)   for each plane of a parameter once: d(value) / d(that)
//   s.wants(j)        whether anybody asks for those
//   s.keep(j, k, v), s.kept(j, k, again)   v once more before that, or again() where the gradients
//                     lie too far away to keep it in their place
// The lanes are neighbouring sites, or, of a formula that declares `across_planes`, they may be the
// planes of one: then k counts vectors of them, and such a formula takes
//   s.index(k)        each lane's plane
//   s.count(j)        how many planes input j really has; lanes behind the last repeat it, and
//   s.real(k, v)      is 0 there
//   s.sum(v), s.largest(v)   of what each lane has found
template <class F>
constexpr bool has_planes = [] {
  for (const Input& input : F::inputs)
    if (input.planes != 1) return true;
  return false;
}();

template <class F>
constexpr bool across_planes = requires { F::across_planes; };

// Whether lanes V are float64.
template <class V>
constexpr bool precise = sizeof(typename V::value_type) == 8;

// A sum of many terms in two levels: 50,000 of them one after the other would lose digits.
template <class V>
class LongSum {
 public:
  explicit FASTVAE_INLINE LongSum(const V& zero) : zero_(zero), total_(zero), part_(zero) {}
  FASTVAE_INLINE void add(const V& term) {
    part_ = part_ + term;
    if (++count_ % 64 == 0) total_ = total_ + part_, part_ = zero_;
  }
  FASTVAE_INLINE V total() const { return total_ + part_; }

 private:
  V zero_, total_, part_;
  int64_t count_ = 0;
};

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
