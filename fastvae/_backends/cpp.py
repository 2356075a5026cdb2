"""The C++ backend: CPU tensors through torch.ops.fastvae."""

import torch
from torch import Tensor

from fastvae._backends._common import Backend, Prior, Terms, draw_seed, in_transform
from fastvae.likelihoods import Likelihood

try:
    import fastvae._C as _C
    import fastvae._ops  # noqa: F401  (registers the fakes)
except ImportError as error:
    _STATUS = Backend(
        False, f"the C++ extension is not built ({error}); CPU tensors use the eager backend"
    )
else:
    _info = _C.build_info()
    _STATUS = Backend(
        True, f"{_info['isa']}, compiled by {_info['compiler']} for torch {_info['torch']}"
    )

_ops = torch.ops.fastvae


def status() -> Backend:
    return _STATUS


def _seed(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    """As draw_seed, the same value; an op of ours is faster and compiles to the same draws."""
    if in_transform():  # randint obeys vmap's randomness=
        return draw_seed(mu, generator)
    seed: Tensor = _ops.seed.default(mu, generator)
    return seed


def rsample(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    generator: torch.Generator | None,
    sample_offset: int,
) -> Tensor:
    seed = _seed(mu, generator)
    z: Tensor = _ops.rsample.default(mu, logvar, seed, num_samples, sample_offset)
    return z


def rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    generator: torch.Generator | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    seed = _seed(mu, generator)
    z, kl = _ops.rsample_kl.default(mu, logvar, seed, num_samples, sample_offset)
    return z, kl


def kl_divergence(mu: Tensor, logvar: Tensor, prior: Prior | None) -> Tensor:
    kl: Tensor = _ops.kl_divergence.default(mu, logvar, *(prior or ()))
    return kl


def log_likelihood(
    x: Tensor, params: tuple[Tensor, ...], likelihood: Likelihood, mask: Tensor | None
) -> Tensor:
    value: Tensor = _ops.log_likelihood.default(
        x, params, likelihood.family, likelihood.options, mask
    )
    return value


def elbo(
    x: Tensor,
    params: tuple[Tensor, ...],
    kl: Tensor,
    likelihood: Likelihood,
    mask: Tensor | None,
    weight: Tensor | None,
    beta: float,
    reduction: str,
) -> Terms:
    return Terms(
        *_ops.elbo.default(
            x, params, kl, likelihood.family, likelihood.options, mask, weight, beta, reduction
        )
    )
