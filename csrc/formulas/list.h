// The names of every row formula. A new likelihood is one header, named here and included in all.h.
#pragma once

#define FASTVAE_LIKELIHOODS(X) X(Bernoulli) X(BernoulliProbs) X(Gaussian) X(GaussianLogvar)
#define FASTVAE_FORMULAS(X) FASTVAE_LIKELIHOODS(X) X(StandardKL) X(NormalKL)

namespace fastvae {

constexpr int max_inputs = 4;
constexpr int max_options = 2;

enum class Family {
#define FASTVAE_ENUM(F) F,
  FASTVAE_FORMULAS(FASTVAE_ENUM)
#undef FASTVAE_ENUM
};

}  // namespace fastvae
