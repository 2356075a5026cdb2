"""The likelihood families, by name and as objects."""

from collections.abc import Callable

from fastvae.likelihoods._base import Likelihood
from fastvae.likelihoods.bernoulli import Bernoulli, BernoulliProbs
from fastvae.likelihoods.categorical import Categorical
from fastvae.likelihoods.counts import (
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    poisson_log_rate,
)
from fastvae.likelihoods.gaussian import Gaussian, gaussian_per_element

__all__ = [
    "Bernoulli",
    "BernoulliProbs",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "ZeroInflatedNegativeBinomial",
    "get",
    "registry",
]

#: Family name → how to make it with its defaults. Tests and benchmarks go through this table.
registry: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": Bernoulli,
    "bernoulli_probs": BernoulliProbs,
    "gaussian": Gaussian,
    "gaussian_logvar": gaussian_per_element,
    "poisson": Poisson,
    "poisson_log": poisson_log_rate,
    "negative_binomial": NegativeBinomial,
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
    "categorical": Categorical,
}


def get(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood object that a name or an object means.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a Likelihood.
    """
    if isinstance(likelihood, Likelihood):
        if not hasattr(likelihood, "family"):
            raise TypeError("likelihood must be one of the families, got the bare base class")
        return likelihood
    if not isinstance(likelihood, str):
        raise TypeError(
            "likelihood must be a name or a fastvae.likelihoods object, got "
            f"{type(likelihood).__name__}"
        )
    if likelihood not in registry:
        raise ValueError(f"likelihood must be one of {', '.join(registry)}, got {likelihood!r}")
    return registry[likelihood]()
