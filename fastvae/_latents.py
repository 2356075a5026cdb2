"""What names a diagonal normal: its mean, and one of logvar, std and log_std; or an object with
them. Checked once, before any memory is touched, and brought to mu and logvar."""

import numbers
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from fastvae._backends import Prior
from fastvae._backends._common import readable
from fastvae._validation import broadcasts, check_floating, check_mask, shape
from fastvae.likelihoods._base import number


class HasLogvar(Protocol):
    """What diffusers' DiagonalGaussianDistribution has, among others."""

    mean: Tensor
    logvar: Tensor


Posterior = Tensor | Distribution | HasLogvar
AnyPrior = tuple[Tensor | float, Tensor | float] | Distribution | HasLogvar | torch.nn.Module

_SPREADS = ("logvar", "std", "log_std")


def latent(
    mu: Posterior,
    logvar: Tensor | None,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    mask: Tensor | None = None,
    mask_name: str = "mask",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """mu, ln σ² and the mask in their shape; raises unless the two are dense floating tensors
    alike, with a batch dimension, and exactly one of the three is given, or none beside a
    distribution.

    Under autocast, which gives some ops' outputs in float32 among others', their dtypes may differ:
    then both come back in the wider one. Of a 16-bit std, whose logarithm 16 bits would round far
    more than std itself is, both come back in float32.
    """
    given = [(n, t) for n, t in zip(_SPREADS, (logvar, std, log_std), strict=True) if t is not None]
    if not given and (found := of_batch(mu)) is not None:
        mu, spread = check_latent(*found)
        return mu, spread, check_mask(mask, mu, mask_name, "mu")
    check_floating("mu", cast(Tensor, mu))
    mu = cast(Tensor, mu)
    if len(given) != 1:
        names = " and ".join(name for name, _ in given) or "none of them"
        raise ValueError(f"beside mu give exactly one of logvar, std and log_std, got {names}")
    ((name, spread),) = given
    mu, spread = check_latent(mu, spread, name)
    mask = check_mask(mask, mu, mask_name, "mu")
    if name == "logvar":
        return mu, spread, mask
    if name == "log_std":
        return mu, 2 * spread, mask
    if mask is not None:  # whose logarithm nobody must see, nor its derivative
        spread = torch.where(mask, spread, 1)
    if readable(spread) and bool((spread <= 0).any()):
        raise ValueError(f"std must be above 0, got {spread.min().item()}")
    return _wide(mu), _wide(spread).log() * 2, mask


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.itemsize == 2 else t


def check_latent(mu: Tensor, spread: Tensor, name: str = "logvar") -> tuple[Tensor, Tensor]:
    """The two; raises unless they are dense floating tensors alike, with a batch dimension."""
    check_floating("mu", mu)
    check_floating(name, spread)
    if mu.shape != spread.shape:
        raise ValueError(
            f"mu and {name} must have the same shape, got {shape(mu)} and {shape(spread)}"
        )
    if mu.dtype != spread.dtype and not _under_autocast(mu):
        raise TypeError(
            f"mu and {name} must have the same dtype, got {mu.dtype} and {spread.dtype}"
        )
    if mu.device != spread.device:
        raise ValueError(
            f"mu and {name} must be on the same device, got {mu.device} and {spread.device}"
        )
    if mu.dim() == 0:
        raise ValueError("mu must have a batch dimension, got []: mu[None] is a batch of one")
    if mu.dtype == spread.dtype:
        return mu, spread
    wide = torch.promote_types(mu.dtype, spread.dtype)
    return mu.to(wide), spread.to(wide)


def of_distribution(q: object) -> tuple[Tensor, Tensor] | None:
    """mean and ln σ² of what has them; None for anything else."""
    if isinstance(q, (Tensor, type, tuple, list)):
        return None
    d = q.base_dist if isinstance(q, Independent) else q
    if isinstance(d, Normal):
        return _wide(d.loc), 2 * _wide(d.scale).log()
    for name in ("mu", "mean"):
        mean, logvar = getattr(d, name, None), getattr(d, "logvar", None)
        if isinstance(mean, Tensor) and isinstance(logvar, Tensor):
            return mean, logvar
    return None


def of_batch(q: object) -> tuple[Tensor, Tensor] | None:
    """The same of a posterior, whose dimension 0 is the batch."""
    if isinstance(q, Tensor):
        return None
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal) and len(q.batch_shape) != 1:
        raise ValueError(
            "q must have one batch dimension, the rest reinterpreted as the event, got "
            f"batch_shape {list(q.batch_shape)} and event_shape {list(q.event_shape)}"
        )
    if getattr(q, "deterministic", False):
        raise ValueError("q is deterministic: take its mean, there is nothing to sample")
    return of_distribution(q)


def expand_prior(prior: AnyPrior, mu: Tensor) -> Prior:
    """The prior's parameters in mu's shape and dtype, or, of a distribution's and under autocast,
    the widest dtype of the three; raises unless they fit.
    """
    found = of_distribution(prior)
    pair = prior if found is None else found
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            "prior must be a pair (mu, logvar) of tensors or numbers, or a Normal or another "
            f"object with tensors mu (or mean) and logvar, got {type(prior).__name__}"
        )
    names = ("prior mu", "prior logvar")
    tensors = tuple(_as_tensor(name, t, mu) for name, t in zip(names, pair, strict=True))
    for name, t in zip(names, tensors, strict=True):
        check_floating(name, t)
        if t.dtype != mu.dtype and found is None and not _under_autocast(mu):
            raise TypeError(f"{name} must have mu's dtype {mu.dtype}, got {t.dtype}")
        if t.device != mu.device:
            raise ValueError(f"{name} must be on mu's device {mu.device}, got {t.device}")
        if not broadcasts(t, mu.shape):
            raise ValueError(f"{name} must broadcast to mu's shape {shape(mu)}, got {shape(t)}")
    first, second = (t.expand(mu.shape) for t in tensors)
    if first.dtype == second.dtype == mu.dtype:
        return first, second
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), mu.dtype)
    return first.to(wide), second.to(wide)


def _as_tensor(name: str, value: Any, mu: Tensor) -> Tensor:
    """A number, or a tensor of no dimension, as a tensor like mu; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        return beside(value, mu).to(mu.dtype)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return cast(Tensor, value)
    found, most = number(name, value), torch.finfo(mu.dtype).max
    if not -most <= found <= most:
        raise ValueError(f"{name} must be a finite {mu.dtype}, got {found}")
    return (
        mu.new_ones(()) * found
    )  # not new_full, which would make it a constant of a compiled graph


def beside(t: Tensor, like: Tensor) -> Tensor:
    """A number of the host's without a copy that the device waits for: Normal(0.0, 1.0)."""
    number = t.dim() == 0 and t.device.type == "cpu" and not t.requires_grad
    return like.new_full((), t.item()) if number and like.device.type != "cpu" else t


def _under_autocast(t: Tensor) -> bool:
    kind = t.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
