"""The C++ backend: CPU tensors through torch.ops.fastvae."""

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from fastvae._backends import _common
from fastvae._backends._common import (
    Backend,
    Beta,
    Prior,
    Terms,
    in_transform,
    minor,
)
from fastvae._composite import compute_dtype
from fastvae._math import times_beta
from fastvae.likelihoods import Likelihood

OLDEST_TORCH = "2.10"


def _load() -> Backend:
    if minor(torch.__version__) < minor(OLDEST_TORCH):
        detail = f"torch {torch.__version__} is older than {OLDEST_TORCH}, the oldest supported"
        return _unusable(f"{detail}; the C++ extension is not loaded")
    if importlib.util.find_spec("fastvae._C") is None:
        return Backend(False, "the C++ extension is not built; CPU tensors use the eager backend")
    try:
        import fastvae._C as _C

        info = _C.build_info()
        if minor(info["torch"]) != minor(torch.__version__):  # another ABI, even if it loads
            raise ImportError(f"it was built for torch {info['torch']}, not {torch.__version__}")
        import fastvae._ops  # noqa: F401  (registers the fakes)
    except Exception as error:
        return _unusable(f"the C++ extension does not load, rebuild it against this torch: {error}")
    return Backend(True, f"{info['isa']}, compiled by {info['compiler']} for torch {info['torch']}")


def _unusable(detail: str) -> Backend:
    warnings.warn(f"fastvae: {detail}; using the eager backend", stacklevel=3)
    return Backend(False, detail)


_STATUS = _load()

_ops = torch.ops.fastvae


class _Nothing:
    """What `direct` is without the extension."""

    def rsample(self, *args: object) -> None: ...
    def rsample_kl(self, *args: object) -> None: ...
    def elbo(self, *args: object) -> None: ...


def _direct() -> Any:
    if not _STATUS.available:
        return _Nothing()
    import fastvae._C as _C

    return _C


#: The common calls without torch.ops, whose matching of arguments to a schema takes longer than a
#: small kernel. Each returns None where it can't serve, or where an operator refuses an argument:
#: the checks of functional.py then say why, in the words of that interface.
direct = _direct()


def status() -> Backend:
    return _STATUS


def empty_cache() -> int:
    """Frees the memory that is kept for the next large CPU outputs.

    Outputs of 256 KiB and more reuse memory that earlier ones have given back, up to four pieces.
    ``FASTVAE_CACHE=0`` in the environment turns that off.

    Returns:
        How many bytes were freed.
    """
    if not _STATUS.available:
        return 0
    from fastvae import _C

    freed: int = _C.empty_cache()
    return freed


def draw_seed(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same value as eager's; an op of ours is faster and compiles to the same draws."""
    if in_transform():  # randint obeys vmap's randomness=
        return _common.draw_seed(mu, generator)
    # Compiled, two calls on one tensor would be merged into one draw: AOTAutograd's elimination of
    # common subexpressions knows of torch's random operators alone. It never merges `empty`.
    like = torch.empty(0, device=mu.device) if torch.compiler.is_compiling() else mu
    seed: Tensor = _ops.seed.default(like, generator)
    return seed


def rsample(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sample_offset: int,
    sample_index: Tensor | None,
) -> Tensor:
    z: Tensor = _ops.rsample.default(mu, logvar, seed, num_samples, sample_offset, sample_index)
    return z


def rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sample_offset: int,
    sample_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z, kl = _ops.rsample_kl.default(mu, logvar, seed, num_samples, sample_offset, sample_index)
    return z, kl


def kl_divergence(mu: Tensor, logvar: Tensor, prior: Prior | None, mask: Tensor | None) -> Tensor:
    kl: Tensor = _ops.kl_divergence.default(mu, logvar, *(prior or (None, None)), mask)
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
    beta: Beta,
    reduction: str,
    inplace_backward: bool,
) -> tuple[Terms, Tensor]:
    compiling = torch.compiler.is_compiling()
    args = (likelihood.family, likelihood.options, mask)
    op = _ops.elbo_inplace.default if inplace_backward and not compiling else _ops.elbo.default
    if not compiling and not isinstance(beta, Tensor):
        *terms, rows = op(x, params, kl, *args, weight, beta, reduction)
        return Terms(*terms), rows
    # A tensor; or traced, where an op's float is a constant: each β of an annealing schedule, and
    # for the mean each batch size, would compile again.
    kl = kl.to(compute_dtype(torch.promote_types(kl.dtype, params[0].dtype)))
    if reduction == "mean":
        mean = kl.new_ones(x.shape[:1]) / max(x.shape[0], 1)
        weight = mean if weight is None else weight * mean
        reduction = "sum"
    loss, ll, _, rows = op(x, params, times_beta(kl, beta), *args, weight, 1.0, reduction)
    weighted = kl.detach() if weight is None else kl.detach() * weight.detach()
    if reduction == "sum":
        weighted = weighted.sum()
    return Terms(loss, ll, weighted.to(loss.dtype)), rows


def count_nonfinite(state: Tensor, rows: Tensor, kl: Tensor, weight: Tensor | None) -> None:
    _ops.count_nonfinite.default(state, rows, kl, weight)
