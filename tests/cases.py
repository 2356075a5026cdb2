"""Awkward shapes, dtypes and layouts, named once; the likelihood families; the error bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

SHAPES: dict[str, tuple[int, ...]] = {
    "no_event_dims": (5,),
    "one_element": (1, 1),
    "one_row": (1, 17),
    "one_column": (9, 1),
    "empty_batch": (0, 7),
    "empty_event": (3, 0),
    "odd_7": (3, 7),
    "odd_15": (3, 15),
    "odd_17": (3, 17),
    "odd_33": (5, 33),
    "odd_1025": (3, 1025),
    "odd_5001": (2, 5001),  # several programs a row on a GPU
    "odd_70001": (2, 70001),  # several blocks a row; 64 accumulators have over 1000 terms each
    "many_rows": (2049, 5),  # more rows than one thread's grain
    "image": (3, 3, 5, 7),
    "five_event_dims": (2, 3, 1, 5, 2, 3),
}

LAYOUTS = [
    "contiguous",
    "transposed",
    "channels_last",
    "sliced",
    "padded",
    "expanded_batch",
    "expanded_event",
    "misaligned",
]

LAYOUT_SHAPE = (5, 3, 7, 6)

EXTREME_LOGITS = [
    sign * size for size in (0.0, 1e-4, 1.0, 17.0, 88.0, 104.0, 100.0, 1e4) for sign in (1, -1)
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result, and of everything that happens on the way to it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same shape, dtype and values in another memory layout; the expanded layouts keep only
    the values of the first index of the dimension that they expand."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        backwards = tuple(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout == "channels_last":
        last = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
        return values.contiguous(memory_format=last)
    if layout == "sliced":  # every second element of the last dimension
        wide = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1])
        view = wide[..., ::2]
    elif layout == "padded":  # each row contiguous, but not next to the row before
        wide = values.new_zeros(values.shape[0], 2, *values.shape[1:])
        view = wide[:, 1]
    elif layout == "expanded_batch":
        return values[:1].clone().expand(values.shape)
    elif layout == "expanded_event":
        return values[..., :1].clone().expand(values.shape)
    elif layout == "misaligned":  # one element past where any vector load is aligned
        view = values.new_zeros(values.numel() + 1)[1:].view(values.shape)
    else:
        raise ValueError(layout)
    view.copy_(values)
    return view


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those tensors; the floating ones, which are alone differentiable, require a gradient."""
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_floating_point()]


def run(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The value, and the gradient of every floating input (of leaves, strides kept)."""
    leaves = leaves_of(inputs)
    value = function(*leaves)
    wanted = floating(leaves)
    if upstream is None:
        upstream = torch.ones((), device=value.device)
    grads = torch.autograd.grad(value, wanted, upstream.to(value.dtype).expand_as(value))
    return value.detach(), list(grads)


def upstream_like(shape: Sequence[int]) -> Tensor:
    """An upstream gradient that is never one, never constant, and exact in float32."""
    return torch.linspace(0.5, 2.1, math.prod(shape), dtype=torch.float32).view(tuple(shape))


# -------------------------------------------------------------------------------------- error bound


def torch_error_bound(
    torchs: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    ulps: float | None = None,
) -> Tensor:
    """How far an element may be from the oracle: (2 * torch's worst relative error + ulps * eps)
    * scale.

    Errors are relative to scale: the largest magnitude of the oracle by default, or, elementwise,
    the size of the operands (for x - p: |x| + |p|), which is the least that rounding can do.
    torch's error is its worst over the tensor, as a single element may be right by luck. The ULPs
    are for tensors so small that all of torch's are: 4, and 1 for half precision, where there is
    one rounding at the end. Results below the smallest normal number may be flushed to zero.
    """
    oracle = oracle.double()
    tiny = torch.finfo(dtype).smallest_normal
    if ulps is None:
        ulps = 1.0 if dtype in (torch.bfloat16, torch.float16) else 4.0
    finite = oracle.isfinite() & torchs.isfinite()
    if scale is None:
        scale = oracle[finite].abs().max() if finite.any() else torch.tensor(0.0)
    scale = scale.double().expand_as(oracle).clamp(min=tiny)
    relative = torch.where(finite, (torchs.double() - oracle).abs() / scale, 0.0)
    worst = relative.max() if relative.numel() else torch.tensor(0.0)
    floor = 4 * torch.finfo(compute_dtype(dtype)).smallest_normal
    return (2 * worst + ulps * torch.finfo(dtype).eps) * scale + floor


def assert_within(ours: Tensor, oracle: Tensor, bound: Tensor, *, what: str = "result") -> None:
    """|ours - oracle| <= bound; infinities and NaN must be the oracle's. Prints the worst."""
    assert ours.shape == oracle.shape, f"{what}: shape {ours.shape}, oracle {oracle.shape}"
    if not ours.numel():
        return
    oracle, got = oracle.double(), ours.double()
    limit = torch.finfo(ours.dtype).max
    expected = torch.where(oracle.abs() > limit, oracle.sign() * math.inf, oracle)
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (got - expected).abs()).nan_to_num(nan=math.inf)
    excess = torch.where(same, 0.0, error / bound.double().expand_as(error))
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 1:
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
        raise AssertionError(
            f"{what} ({ours.dtype}): worst at {where}: got {got.flatten()[worst].item():.9g}, "
            f"oracle {expected.flatten()[worst].item():.9g}, "
            f"error {error.flatten()[worst].item():.3g} is "
            f"{excess.flatten()[worst].item():.3g} x the bound; "
            f"{int((excess > 1).sum())} of {ours.numel()} elements are out of bounds"
        )


def assert_as_good_as_torch(
    ours: Tensor,
    torchs: Tensor,
    oracle: Tensor,
    *,
    what: str = "result",
    scale: Tensor | None = None,
    ulps: float | None = None,
) -> None:
    assert ours.dtype == torchs.dtype, f"{what}: dtype {ours.dtype}, expected {torchs.dtype}"
    bound = torch_error_bound(torchs, oracle, ours.dtype, scale=scale, ulps=ulps)
    assert_within(ours, oracle, bound, what=what)


def noise_bound(radius: Tensor) -> Tensor:
    """How far r cos(angle) in float32 may be off. The angle (up to pi) and the functions round to
    about 4 ULP of r. u rounds by 2^-25 twice, which moves r = sqrt(-2 ln u) by 2^-24 / r: what
    dominates near u = 1."""
    return 4 * 2.0**-23 * radius + 2.0**-24 / radius


# ----------------------------------------------------------------------------------------- families

# One of each kind of formula: what belongs to the loop is tested with these; with the others by
# the full products alone (conftest.py).
REPRESENTATIVES = ("bernoulli", "gaussian_logvar", "zero_inflated_negative_binomial", "categorical")


@dataclass(frozen=True)
class Family:
    """A likelihood with its options, torch's own formula (elementwise), and the sizes of the
    operands of the value and of each gradient, in the order of the inputs (x, *parameters)."""

    name: str
    torchs: Callable[..., Tensor]
    magnitudes: Callable[..., tuple[Tensor, ...]]
    draw: Callable[[Sequence[int], Sequence[int]], tuple[Tensor, ...]]  # x shape, recon shape
    options: dict[str, Any] = field(default_factory=dict)
    sites: bool = False  # the parameters have a dimension more than x, behind the rows'

    def together(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x and the parameters in one shape; of sites as they are."""
        return tuple(tensors) if self.sites else torch.broadcast_tensors(*tensors)

    def of_params(self, mask: Tensor, x: Tensor) -> Tensor:
        return mask.expand(x.shape).unsqueeze(1) if self.sites else mask

    def where(self, mask: Tensor, tensors: Sequence[Tensor], otherwise: float) -> list[Tensor]:
        """x and the parameters where the mask is True, elsewhere that number."""
        masks = [mask] + [self.of_params(mask, tensors[0])] * (len(tensors) - 1)
        pairs = zip(masks, tensors, strict=True)
        return [torch.where(m, t, otherwise).to(t.dtype) for m, t in pairs]

    def make(self) -> Any:
        from fastvae import likelihoods

        make: Callable[..., Any] = likelihoods.registry[self.name]
        return make(**self.options)

    def params(self, x: Tensor, recon: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the operators take."""
        params: tuple[Tensor, ...] = self.make().params(tuple(recon), x)
        return params

    def inputs(
        self, shape: Sequence[int], dtype: torch.dtype, num_samples: int | None = None
    ) -> list[Tensor]:
        recon_shape = shape if num_samples is None else (num_samples, *shape)
        drawn = self.draw(shape, recon_shape)
        return [t.to(dtype) if t.is_floating_point() else t for t in drawn]  # counts stay such


def _bernoulli_sizes(x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    logs = F.softplus(logits) + F.softplus(-logits)
    return logs, logs, x + logits.sigmoid()


def _probs(log_min: float) -> dict[str, Any]:
    def torchs(x: Tensor, p: Tensor) -> Tensor:
        # torch's gradient in x has no clamp: at p = 0 it is infinite where the value is finite
        fixed = p.detach()
        log_p, log_q = (fixed.log().clamp(min=log_min), (-fixed).log1p().clamp(min=log_min))
        slope = -F.binary_cross_entropy(p, x.detach(), reduction="none")
        return x * log_p + (1 - x) * log_q + (slope - slope.detach())

    def sizes(x: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        log_p, log_q = p.log().clamp(min=log_min), torch.log1p(-p).clamp(min=log_min)
        return (
            -(x * log_p + (1 - x) * log_q),
            -log_p - log_q,
            (x + p) / (p * (1 - p)).clamp(min=1e-12),
        )

    def draw(x: Sequence[int], recon: Sequence[int]) -> tuple[Tensor, ...]:
        return torch.rand(*x), torch.rand(*recon)

    return {"torchs": torchs, "magnitudes": sizes, "draw": draw, "options": {"log_min": log_min}}


def _gaussian(scale: float, normalized: bool) -> dict[str, Any]:
    constant = math.log(scale) + 0.5 * math.log(2 * math.pi) if normalized else 0.0

    def torchs(x: Tensor, mean: Tensor) -> Tensor:
        return -0.5 * ((x - mean) / scale) ** 2 - constant

    def sizes(x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
        z = (x - mean).abs() / scale
        return z**2 / 2 + abs(constant), z / scale, z / scale

    def draw(x: Sequence[int], recon: Sequence[int]) -> tuple[Tensor, ...]:
        return torch.randn(*x), torch.randn(*recon)

    options = {"scale": scale, "normalized": normalized}
    return {"torchs": torchs, "magnitudes": sizes, "draw": draw, "options": options}


def _logvar_torchs(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean) ** 2 * (-logvar).exp())


def _logvar_sizes(x: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    precision = (-logvar).exp()
    q, d = (x - mean) ** 2 * precision, (x - mean).abs() * precision
    return (q + logvar.abs() + math.log(2 * math.pi)) / 2, d, d, (q + 1) / 2


def _poisson_torchs(x: Tensor, mean: Tensor) -> Tensor:
    return x * mean.log() - mean - torch.lgamma(x + 1)


def _poisson_sizes(x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    value = x * mean.log().abs() + mean + torch.lgamma(x + 1)
    return value, value, x / mean + 1


def _poisson_log_sizes(x: Tensor, log_mean: Tensor) -> tuple[Tensor, ...]:
    value = x * log_mean.abs() + log_mean.exp() + torch.lgamma(x + 1)
    return value, value, x + log_mean.exp()


def _nb_torchs(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    rise = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    log_total = (theta + mean).log()
    return rise + theta * (theta.log() - log_total) + x * (mean.log() - log_total)


def _nb_sizes(x: Tensor, mean: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    total, l = theta + mean, torch.log1p(mean / theta)
    value = theta * l + x * (mean / total).log().abs() + torch.lgamma(x + 1)
    by_theta = l + (x + mean) / total + torch.digamma(x + theta) - torch.digamma(theta)
    return value, value, x / mean + (x + theta) / total, by_theta


def _zinb_torchs(x: Tensor, mean: Tensor, theta: Tensor, z: Tensor) -> Tensor:
    nb = _nb_torchs(x, mean, theta)
    return torch.where(x == 0, torch.logaddexp(z, nb), nb) - F.softplus(z)


def _zinb_sizes(x: Tensor, mean: Tensor, theta: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    value, *others = _nb_sizes(x, mean, theta)
    return value + z.abs() + 1, *others, torch.full_like(z, 2)


def _draw_counts(*scales: float) -> Callable[[Sequence[int], Sequence[int]], tuple[Tensor, ...]]:
    """Mostly 0 and small, some beyond the limit of the product; parameters of a log-normal."""

    def draw(x: Sequence[int], recon: Sequence[int]) -> tuple[Tensor, ...]:
        counts = torch.poisson((1.5 * torch.randn(*x) - 1).exp())
        counts = torch.where(torch.rand(*x) < 0.05, 37 * counts + 11, counts)
        return counts.long(), *((s * torch.randn(*recon)).exp() for s in scales)

    return draw


def _with_normal(
    draw: Callable[[Sequence[int], Sequence[int]], tuple[Tensor, ...]],
) -> Callable[[Sequence[int], Sequence[int]], tuple[Tensor, ...]]:
    return lambda x, recon: (*draw(x, recon), 2 * torch.randn(*recon))


def _categorical() -> Family:  # of five classes
    def torchs(x: Tensor, logits: Tensor) -> Tensor:
        dim, index = -x.dim(), x.long().unsqueeze(1)[(None,) * (logits.dim() - x.dim() - 1)]
        return torch.take_along_dim(logits.log_softmax(dim), index, dim).squeeze(dim)

    def sizes(x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        terms = -torchs(x, logits)
        return terms, terms, F.one_hot(x.long(), 5).movedim(-1, 1) + logits.softmax(-x.dim())

    def draw(x: Sequence[int], recon: Sequence[int]) -> tuple[Tensor, ...]:
        lead = len(recon) - len(x) + 1
        return torch.randint(5, tuple(x)), 3 * torch.randn(*recon[:lead], 5, *recon[lead:])

    return Family("categorical", torchs, sizes, draw, sites=True)


FAMILIES: dict[str, Family] = {
    "bernoulli": Family(
        "bernoulli",
        lambda x, logits: -F.binary_cross_entropy_with_logits(logits, x, reduction="none"),
        _bernoulli_sizes,
        lambda x, recon: (torch.rand(*x), 3 * torch.randn(*recon)),
    ),
    "bernoulli_probs": Family("bernoulli_probs", **_probs(-100.0)),
    "bernoulli_probs_log_min": Family("bernoulli_probs", **_probs(-2.0)),
    "gaussian": Family("gaussian", **_gaussian(1.0, True)),
    "gaussian_scale": Family("gaussian", **_gaussian(0.3, True)),
    "gaussian_unnormalized": Family("gaussian", **_gaussian(2.5, False)),
    "gaussian_logvar": Family(
        "gaussian_logvar",
        _logvar_torchs,
        _logvar_sizes,
        lambda x, recon: (torch.randn(*x), torch.randn(*recon), torch.randn(*recon)),
    ),
    "poisson": Family("poisson", _poisson_torchs, _poisson_sizes, _draw_counts(1.0)),
    "poisson_log": Family(
        "poisson_log",
        lambda x, l: x * l - l.exp() - torch.lgamma(x + 1),
        _poisson_log_sizes,
        _with_normal(_draw_counts()),
    ),
    "negative_binomial": Family("negative_binomial", _nb_torchs, _nb_sizes, _draw_counts(1.5, 1.0)),
    "zero_inflated_negative_binomial": Family(
        "zero_inflated_negative_binomial",
        _zinb_torchs,
        _zinb_sizes,
        _with_normal(_draw_counts(1.5, 1.0)),
    ),
    "categorical": _categorical(),
}
