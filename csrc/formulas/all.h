// Every row formula, in one list. Include the vocabulary, math/compounds.h, first.
#pragma once

#include <string_view>

#include "formula.h"
#include "list.h"

#include "bernoulli.h"
#include "categorical.h"
#include "counts.h"
#include "gaussian.h"
#include "latent.h"

namespace fastvae {

template <class... F>
struct List {
  static constexpr int size = sizeof...(F);
  static_assert(((inputs_of<F> <= max_inputs && F::options <= max_options) && ...),
                "RowwiseArgs has no room for it");
  static_assert(((!has_planes<F> || F::inputs[1].planes != 1) && ...),
                "the operators read the rows' dimensions off the first parameter");
};

// A new likelihood is one header, included above and named here.
using Likelihoods = List<Bernoulli, BernoulliProbs, Gaussian, GaussianLogvar, Poisson, PoissonLog,
                         NegativeBinomial, ZeroInflatedNegativeBinomial, Categorical>;
using Divergences = List<StandardKL, NormalKL>;

// Calls f(index, Formula{}) for each.
template <class... F, class Fn>
constexpr void for_each_formula(List<F...>, Fn&& fn) {
  int index = 0;
  (fn(index++, F{}), ...);
}

template <class... A, class... B>
List<A..., B...> joined(List<A...>, List<B...>);
using Formulas = decltype(joined(Likelihoods{}, Divergences{}));

// Its place in Formulas.
template <class F>
constexpr int index_of = [] {
  int found = -1;
  for_each_formula(Formulas{}, [&](int i, auto f) {
    if (std::is_same_v<decltype(f), F>) found = i;
  });
  return found;
}();

// Calls f(Formula{}) for the one at that place.
template <class Fn>
inline void with_formula(int formula, Fn&& fn) {
  for_each_formula(Formulas{}, [&](int i, auto f) {
    if (i == formula) fn(f);
  });
}

}  // namespace fastvae
