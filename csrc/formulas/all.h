// Every row formula. Include a vocabulary first: cpu/vec.h, cuda/math.h or aten_math.h.
#pragma once

#include "formula.h"
#include "list.h"

#include "bernoulli.h"
#include "gaussian.h"
#include "latent.h"

namespace fastvae {

// What the arrays of RowwiseArgs have room for.
#define FASTVAE_FITS(F) static_assert(F::inputs <= max_inputs && F::options <= max_options, #F);
FASTVAE_FORMULAS(FASTVAE_FITS)
#undef FASTVAE_FITS

// Calls f(Formula{}) for the formula that `family` names.
template <class Fn>
inline auto with_formula(Family family, Fn&& fn) {
  switch (family) {
#define FASTVAE_CASE(F) \
  case Family::F:       \
    return fn(F{});
    FASTVAE_FORMULAS(FASTVAE_CASE)
#undef FASTVAE_CASE
  }
  __builtin_unreachable();
}

}  // namespace fastvae
