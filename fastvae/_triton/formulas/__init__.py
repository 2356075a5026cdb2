"""Every row formula, by the name that csrc/formulas/ gives it.

A formula takes (inputs, options), both tuples, and returns the value per element and a tuple of
its derivatives, one per input. One of `sites` takes (sites, planes, options), reads the former by
`plane` and puts its derivatives by `put_gradient` (operands.py), and returns the value.
"""

from fastvae._triton.formulas.bernoulli import bernoulli, bernoulli_probs
from fastvae._triton.formulas.categorical import categorical
from fastvae._triton.formulas.counts import (
    negative_binomial,
    poisson,
    poisson_log,
    zero_inflated_negative_binomial,
)
from fastvae._triton.formulas.gaussian import gaussian, gaussian_logvar
from fastvae._triton.formulas.latent import normal_kl, standard_kl

elements = {
    "bernoulli": bernoulli,
    "bernoulli_probs": bernoulli_probs,
    "gaussian": gaussian,
    "gaussian_logvar": gaussian_logvar,
    "poisson": poisson,
    "poisson_log": poisson_log,
    "negative_binomial": negative_binomial,
    "zero_inflated_negative_binomial": zero_inflated_negative_binomial,
}
# Of so many registers that half a tile is taken at a time; no memory waits for them.
heavy = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")
sites = {"categorical": categorical}
likelihoods = {**elements, **sites}
formulas = {**likelihoods, "standard_kl": standard_kl, "normal_kl": normal_kl}
