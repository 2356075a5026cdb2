"""What the public functions check of their arguments, once, before any memory is touched.

An error names the argument, what was expected and what came.
"""

import sys
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastvae._backends._common import Beta, readable
from fastvae.likelihoods import Likelihood
from fastvae.likelihoods._base import number, refuse_tracked, sites

Recon = Tensor | Sequence[Tensor]

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


def check_choice(name: str, value: str, names: tuple[str, ...]) -> None:
    """Raises unless value is one of the names."""
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_beta(beta: object) -> Beta:
    """Beta, a number as a float; raises unless it is finite and ≥ 0: a number, or a floating tensor
    of one element, whose value is read on CPU alone."""
    if type(beta) is float and 0.0 <= beta <= sys.float_info.max:
        return beta
    if isinstance(beta, Tensor):
        check_floating("beta", beta)
        if beta.numel() != 1:
            raise ValueError(f"beta must hold one element, got {shape(beta)}")
        refuse_tracked("beta", beta)
        if readable(beta):
            check_weight("beta", beta.item())
        return beta
    return check_weight("beta", beta, or_else=" or a tensor")


def check_weight(name: str, value: object, or_else: str = "") -> float:
    """A number as a float; raises unless it is finite and ≥ 0."""
    if isinstance(value, torch.SymFloat):
        return cast(float, value)
    found = value if type(value) is float else number(name, value, or_else=or_else)
    if not 0.0 <= found <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and ≥ 0, got {found}")
    return found


def _parameters_of(q: object, name: str) -> str:
    """How mu and logvar are had from something that is no tensor, if it is known."""
    if hasattr(q, "mu") and hasattr(q, "logvar"):
        return f": pass {name}.mu and {name}.logvar"
    if isinstance(q, torch.distributions.Distribution):
        return f": q = fastvae.from_distribution({name}) has q.mu and q.logvar"
    return ""


def shape(t: Tensor) -> str:
    """Sizes, for a message."""
    return str(list(t.shape))


def check_dense(name: str, t: object) -> None:
    """Raises unless t is a plain strided tensor."""
    if not isinstance(t, Tensor):
        way_out = _parameters_of(t, "q") if name in ("mu", "logvar") else ""
        way_out = ": pass mu and logvar" if isinstance(t, tuple) and name == "mu" else way_out
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}{way_out}")
    if type(t) is not Tensor and hasattr(t, "to_local"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.to_local(), and for the "
            "same noise on any number of ranks seed= and sample_index="
        )
    if t.layout != torch.strided or t.is_nested:
        kind = "nested" if t.is_nested else t.layout
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def check_floating(name: str, t: Tensor) -> None:
    """Raises unless t is a dense floating tensor."""
    check_dense(name, t)
    if t.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_stream(
    mu: Tensor, num_samples: int | None, sample_offset: int, sample_index: Tensor | None
) -> None:
    """Raises unless the arguments name a stretch of the stream of noise."""
    if num_samples is not None:
        check_count("num_samples", num_samples, 1)
    check_count("sample_offset", sample_offset, 0)
    if num_samples is not None or sample_offset:
        columns = mu.shape[1:].numel()
        if (sample_offset + mu.shape[0]) * (num_samples or 1) * columns >= 2**63:
            raise ValueError(
                "sample_offset and num_samples must keep the stream below 2^63, got "
                f"{sample_offset} and {num_samples}"
            )
    if sample_index is None:
        return
    if sample_offset:
        raise ValueError("give either sample_offset or sample_index, got both")
    check_integers("sample_index", sample_index, mu)
    if sample_index.shape != mu.shape[:1]:
        raise ValueError(
            f"sample_index must have shape [{mu.shape[0]}], one per sample, "
            f"got {shape(sample_index)}"
        )


def check_integers(name: str, t: Tensor, mu: Tensor) -> None:
    """Raises unless t is a dense int64 tensor on mu's device."""
    check_dense(name, t)
    if t.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {t.dtype}")
    if t.device != mu.device:
        raise ValueError(f"{name} must be on mu's device {mu.device}, got {t.device}")


def check_count(name: str, value: object, least: int) -> None:
    """Raises unless value is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_batch_dims(mu: Tensor, batch_dims: int) -> None:
    """Raises unless mu has so many dimensions."""
    check_count("batch_dims", batch_dims, 0)
    if batch_dims > mu.dim():
        raise ValueError(f"mu must have batch_dims = {batch_dims} dimensions, got {shape(mu)}")


def broadcasts(t: Tensor, shape: torch.Size) -> bool:
    """Whether t expands to that shape."""
    return t.dim() <= len(shape) and all(
        a == 1 or a == b for a, b in zip(reversed(t.shape), reversed(shape), strict=False)
    )


def check_recon(recon: Recon, x: Tensor, family: Likelihood) -> tuple[Tensor, ...]:
    """The formula's parameters, each of the full shape or constant along each row."""
    check_dense("x", x)
    whole = family.domains.get("x") in ("count", "index") and not x.dtype.is_complex
    if x.dtype not in (*_FLOATING, torch.uint8, torch.bool) and not (whole and _whole(x)):
        way_out = "" if x.dtype.is_complex else ": take x.float(), of pixel values x / 255"
        raise TypeError(f"x must be floating, uint8 or bool, got {x.dtype}{way_out}")
    if x.dim() == 0:
        raise ValueError("x must have a batch dimension, got []: x[None] is a batch of one")
    given = (recon,) if isinstance(recon, Tensor) else recon
    names = family.param_names
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"recon must be a tensor or a tuple of them, got {type(recon).__name__}")
    if len(given) != len(names):
        raise ValueError(
            f"recon must hold {', '.join(names)} for {family.family}: {len(names)} expected, "
            f"got {len(given)}"
        )
    for name, t in zip(names, given, strict=True):
        check_floating(name, t)
    params = family.params(tuple(given), x)
    first = params[0]
    planes = family.family in sites  # their shapes the likelihood has seen to
    fits = planes or first.shape == x.shape
    if not fits and (first.dim() != x.dim() + 1 or first.shape[1:] != x.shape):
        raise ValueError(
            f"x and {names[0]} must have the same shape, the latter with a leading sample "
            f"dimension if wanted, got x {shape(x)} and {names[0]} {shape(first)}"
        )
    if first.dim() > x.dim() + planes and first.shape[0] == 0:
        raise ValueError(f"{names[0]} must hold at least one sample, got {shape(first)}")
    if len(params) == 1 and first.device == x.device:  # the common case
        return params
    all_names = family.formula_names
    for name, t in zip(all_names, params, strict=True):
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if planes:
        return params
    rest = zip(all_names[1:], params[1:], strict=True)
    return (first, *(_fit(name, t, first, x.dim() - 1) for name, t in rest))


def _whole(x: Tensor) -> bool:
    return x.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)


def _fit(name: str, t: Tensor, first: Tensor, event_dims: int) -> Tensor:
    """A parameter expanded no further than to a value per element, per row or per column."""
    if t.shape == first.shape:
        return t
    check_dense(name, t)
    if not broadcasts(t, first.shape):
        raise ValueError(f"{name} must broadcast to shape {shape(first)}, got {shape(t)}")
    if t.numel() == 1:
        return t.reshape(())
    lead = first.dim() - event_dims
    own = (*[1] * (first.dim() - t.dim()), *t.shape)
    if all(n == 1 for n in own[lead:]):
        return t.expand(*first.shape[:lead], *[1] * event_dims)
    if all(n == 1 for n in own[:lead]):
        return t.expand(*[1] * lead, *first.shape[lead:])
    return t.expand(first.shape)


def check_mask(mask: Tensor | None, x: Tensor, name: str = "mask", of: str = "x") -> Tensor | None:
    """The mask in x's shape; raises unless it is bool and fits."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {kind}")
    check_dense(name, mask)
    if mask.device != x.device:
        raise ValueError(f"{name} must be on {of}'s device {x.device}, got {mask.device}")
    if not broadcasts(mask, x.shape):
        raise ValueError(f"{name} must broadcast to {of}'s shape {shape(x)}, got {shape(mask)}")
    return mask.expand(x.shape)


def check_per_sample(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    """t; raises unless it has one floating value per sample."""
    if t is None:
        return None
    check_floating(name, t)
    if t.shape != x.shape[:1]:
        raise ValueError(f"{name} must have shape [{x.shape[0]}], one per sample, got {shape(t)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    return t
