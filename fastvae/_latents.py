"""What names a diagonal normal: its mean, and one of logvar, std and log_std; or an object with
them. Checked once, before any memory is touched, and brought to mu and logvar."""

import numbers
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from fastvae._backends import Prior
from fastvae._backends._common import readable
from fastvae._composite import compute_dtype
from fastvae._validation import broadcasts, check_floating, check_mask, shape
from fastvae.likelihoods._base import number


class HasLogvar(Protocol):
    """What diffusers' DiagonalGaussianDistribution has, among others."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def logvar(self) -> Tensor: ...


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
    if not given and (found := of_posterior(mu, mask, mask_name)) is not None:
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
    spread = _kept(spread, mask)
    if readable(spread) and bool((spread <= 0).any()):
        raise ValueError(f"std must be above 0, got {spread.min().item()}")
    return _wide(mu), _wide(spread).log() * 2, mask


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.itemsize == 2 else t


def _kept(std: Tensor, mask: Tensor | None) -> Tensor:
    """1 where it is left out: nobody must see that logarithm, nor its derivative."""
    return std if mask is None else torch.where(mask, std, 1)


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


def of_distribution(q: object, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """mean and ln σ² of what has them; None for anything else."""
    if isinstance(q, (Tensor, type, tuple, list)):
        return None
    if (d := _normal(q)) is not None:
        return _wide(d.loc), 2 * _kept(_wide(d.scale), mask).log()
    for name in ("mu", "mean"):
        mean, logvar = getattr(q, name, None), getattr(q, "logvar", None)
        if isinstance(mean, Tensor) and isinstance(logvar, Tensor):
            return mean, logvar
    return None


def _normal(q: object) -> Normal | None:
    d = q.base_dist if isinstance(q, Independent) else q
    return d if isinstance(d, Normal) else None


def of_posterior(
    q: object, mask: Tensor | None = None, mask_name: str = "mask"
) -> tuple[Tensor, Tensor] | None:
    """The same of what is sampled."""
    if isinstance(q, Tensor):
        return None
    if getattr(q, "deterministic", False):
        raise ValueError("q is deterministic: take its mean, there is nothing to sample")
    if (d := _normal(q)) is not None:
        mask = check_mask(mask, d.loc, mask_name, "mu")
    return of_distribution(q, mask)


def sample_dtype(mu: Posterior, std: Tensor | None) -> torch.dtype | None:
    """Of a sample by a σ, which 16 bits had widened; None: as it comes."""
    if std is not None:  # under autocast they may differ
        return torch.promote_types(cast(Tensor, mu).dtype, std.dtype)
    d = None if isinstance(mu, Tensor) else _normal(mu)
    return None if d is None else torch.promote_types(d.loc.dtype, d.scale.dtype)


def batch_dims_of(q: Posterior, batch_dims: int | None) -> int:
    """How many dimensions the batch has: a distribution's own, else 1 unless it is said."""
    own = None
    if isinstance(q, Distribution) and not isinstance(q, Normal):
        own = len(q.batch_shape)
    if batch_dims is None:
        return 1 if own is None else own
    if own is not None and batch_dims != own:
        raise ValueError(f"q has {own} batch dimensions, got batch_dims = {batch_dims}")
    return batch_dims


def check_one_batch_dim(q: Posterior) -> None:
    """Raises unless a value per sample is one along dimension 0."""
    if isinstance(q, Distribution) and batch_dims_of(q, None) != 1:
        raise ValueError(
            "q must have one batch dimension, the rest reinterpreted as the event, got "
            f"batch_shape {list(q.batch_shape)} and event_shape {list(q.event_shape)}"
        )


def expand_prior(prior: AnyPrior, mu: Tensor, mask: Tensor | None = None) -> Prior:
    """The prior's parameters in mu's shape and dtype, or, of a distribution's and under autocast,
    the widest dtype of the three; beside a 16-bit mu a number makes it float32. Raises unless they
    fit.
    """
    found = of_distribution(prior, mask)
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
        strict = found is None and t.dim() > 0 and not _under_autocast(mu)
        if t.dtype != mu.dtype and strict:
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
        return beside(value, mu).to(compute_dtype(mu.dtype))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return cast(Tensor, value)
    found, most = number(name, value), torch.finfo(mu.dtype).max
    if not -most <= found <= most:
        raise ValueError(f"{name} must be a finite {mu.dtype}, got {found}")
    one = mu.new_ones((), dtype=compute_dtype(mu.dtype))
    return one * found  # not new_full, which would make it a constant of a compiled graph


def beside(t: Tensor, like: Tensor) -> Tensor:
    """A number of the host's without a copy that the device waits for: Normal(0.0, 1.0)."""
    number = t.dim() == 0 and t.device.type == "cpu" and not t.requires_grad
    return like.new_full((), t.item()) if number and like.device.type != "cpu" else t


def _under_autocast(t: Tensor) -> bool:
    kind = t.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
