"""Count likelihoods: Poisson, negative binomial, and with additional zeros. Formulas:
csrc/formulas/counts.h.

In plain PyTorch they are computed in float64, in which ln Γ(x + θ) − ln Γ(θ) may be written as it
stands.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae.likelihoods._base import Likelihood, formula, number, refuse_tracked


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float64, where the device has it; the first of them, x, is data: no gradient."""
    dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    x, *others = (t.to(dtype) for t in tensors)
    return x.detach(), *others


def _times_log(x: Tensor, a: Tensor) -> Tensor:
    """x ln a, 0 where x is 0, derivatives too."""
    return x * torch.where(x > 0, a, 1).log()


@formula
def poisson(options: Sequence[float], x: Tensor, mean: Tensor, size: Tensor) -> Tensor:
    """ln p(x | m) = x ln m − m − ln x!"""
    dtype = mean.dtype
    x, mean, size = _wide(x, mean, size)
    mean = size * mean + options[0]
    return (_times_log(x, mean) - mean - torch.lgamma(x + 1)).to(dtype)


@formula
def poisson_log(options: Sequence[float], x: Tensor, log_mean: Tensor) -> Tensor:
    """ln p(x | l) = x l − e^l − ln x!"""
    dtype = log_mean.dtype
    x, log_mean = _wide(x, log_mean)
    return (x * log_mean - log_mean.exp() - torch.lgamma(x + 1)).to(dtype)


@formula
def negative_binomial(
    options: Sequence[float], x: Tensor, mean: Tensor, dispersion: Tensor, size: Tensor
) -> Tensor:
    """ln p(x | m, θ) = ln Γ(x + θ) − ln Γ(θ) − ln x! − θ ln(1 + m / θ) + x ln(m / (θ + m))"""
    return _nb(options, *_wide(x, mean, dispersion, size)).to(mean.dtype)


def _nb(options: Sequence[float], x: Tensor, mean: Tensor, theta: Tensor, size: Tensor) -> Tensor:
    mean = size * mean + options[0]
    rise = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return rise - theta * torch.log1p(mean / theta) + _times_log(x, mean / (theta + mean))


@formula
def zero_inflated_negative_binomial(
    options: Sequence[float],
    x: Tensor,
    mean: Tensor,
    dispersion: Tensor,
    size: Tensor,
    zero_logits: Tensor,
) -> Tensor:
    """ln p(x) = ln(π [x = 0] + (1 − π) NB(x)), π = σ(zero_logits)"""
    x, wide_mean, theta, size, z = _wide(x, mean, dispersion, size, zero_logits)
    nb = _nb(options, x, wide_mean, theta, size)
    value = torch.where(x == 0, torch.logaddexp(z, nb), nb) - F.softplus(z)
    return value.to(mean.dtype)


class _Counts(Likelihood):
    """What the families share: counts as data, a size factor, and eps."""

    domains: ClassVar[dict[str, str]] = {
        "x": "count",
        "mean": "nonnegative",
        "dispersion": "positive",
        "size_factor": "nonnegative",
    }

    def __init__(self, size_factor: bool, eps: float) -> None:
        super().__init__()
        self.size_factor = bool(size_factor)
        self.eps = number("eps", eps)
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be finite and ≥ 0, got {eps}")

    @property
    def options(self) -> Sequence[float]:
        return (self.eps,)

    def split(self, recon: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The parameters, and the size factor as [B, 1, …]."""
        if not self.size_factor:
            return recon, recon[0].new_ones(())
        *rest, size = recon
        if size.shape != x.shape[:1]:
            raise ValueError(
                f"size_factor must have shape [{x.shape[0]}], one per sample, "
                f"got {list(size.shape)}"
            )
        return tuple(rest), size.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"size_factor={self.size_factor}, eps={self.eps}"


class Poisson(_Counts):
    """ln p(x | m) = x ln m − m − ln x!, from the decoder's mean.

    Args:
        log_rate: the decoder gives ln m instead.
        size_factor: recon is the pair (mean, size_factor), the latter [B]: each sample's mean is
            their product, which is never stored (a cell's library size, an exposure).
        eps: added to the mean: a mean of exactly 0 makes any other count impossible.

    x holds counts in any floating or integer dtype; no gradient flows to it.

    Raises:
        ValueError: eps is negative or not finite; log_rate together with size_factor or eps.
    """

    def __init__(
        self, log_rate: bool = False, *, size_factor: bool = False, eps: float = 0.0
    ) -> None:
        super().__init__(size_factor, eps)
        if log_rate and (size_factor or eps):
            raise ValueError("with log_rate add the size factor's logarithm to it; eps has no use")
        self.log_rate = bool(log_rate)
        self.family = "poisson_log" if log_rate else "poisson"
        self.param_names = ("log_mean",) if log_rate else ("mean",)
        self.formula_names = ("log_mean",) if log_rate else ("mean", "size_factor")
        if size_factor:
            self.param_names += ("size_factor",)

    @property
    def options(self) -> Sequence[float]:
        return () if self.log_rate else super().options

    def params(self, recon: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        if self.log_rate:
            return recon
        rest, size = self.split(recon, x)
        return *rest, size

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        log_mean = 1.5 * torch.randn(*shape, generator=generator) - 1.5
        x = torch.poisson(log_mean.exp(), generator)
        return x, (log_mean if self.log_rate else log_mean.exp(),)


class NegativeBinomial(_Counts):
    """ln NB(x | m, θ), from the decoder's mean m and inverse dispersion θ: the variance is
    m + m² / θ (Lopez et al. 2018).

    recon is (mean, dispersion), the latter of any shape that broadcasts to the mean: per element,
    per feature ([genes]; its gradient is summed over the batch as it is made), or one number.

    Args:
        log_dispersion: ln θ instead of a dispersion from the decoder; recon is the mean alone.
            A number of features: one parameter of this module for each, ``log_dispersion``, that
            starts at 0. A tensor that broadcasts to the event shape: registered as a buffer, or as
            a parameter if it is an ``nn.Parameter``.
        logits: torch.distributions' convention: recon is (total_count, logits), θ and ln(m / θ).
        size_factor: recon has one tensor more, the last, [B]: each sample's mean is multiplied by
            it; the product is never stored.
        eps: added to the mean, as scvi-tools adds 1e-8: a mean of exactly 0, as softmax
            underflows to, makes any other count impossible.

    x holds counts in any floating or integer dtype; no gradient flows to it.

    Raises:
        ValueError: eps is negative or not finite; logits together with log_dispersion,
            size_factor or eps; log_dispersion is not positive.
    """

    def __init__(
        self,
        *,
        log_dispersion: Tensor | int | None = None,
        logits: bool = False,
        size_factor: bool = False,
        eps: float = 0.0,
    ) -> None:
        super().__init__(size_factor, eps)
        if logits and (log_dispersion is not None or size_factor or eps):
            raise ValueError("logits stands for both parameters: give neither log_dispersion, "
                             "size_factor nor eps")  # fmt: skip
        self.family = "negative_binomial"
        self.formula_names = ("mean", "dispersion", "size_factor")
        self.logits = bool(logits)
        self.log_dispersion: Tensor | None = None
        if isinstance(log_dispersion, nn.Parameter):
            self.log_dispersion = log_dispersion
        elif isinstance(log_dispersion, Tensor):
            del self.log_dispersion
            self.register_buffer("log_dispersion", log_dispersion)
        elif isinstance(log_dispersion, int) and not isinstance(log_dispersion, bool):
            if log_dispersion < 1:
                raise ValueError(f"log_dispersion must be a positive number of features, "
                                 f"got {log_dispersion}")  # fmt: skip
            self.log_dispersion = nn.Parameter(torch.empty(log_dispersion))
            self.reset_parameters()
        elif log_dispersion is not None:
            raise TypeError("log_dispersion must be a tensor or a number of features, got "
                            f"{type(log_dispersion).__name__}")  # fmt: skip
        if self.log_dispersion is not None and not self.log_dispersion.is_floating_point():
            raise TypeError(
                f"log_dispersion must be a floating tensor, got {self.log_dispersion.dtype}"
            )
        own = self.log_dispersion is not None
        names = ("total_count", "logits") if logits else ("mean", *(() if own else ("dispersion",)))
        self.param_names = (*names, *(("size_factor",) if size_factor else ()))

    def reset_parameters(self) -> None:
        """Sets a learned log-dispersion to its start, 0: after the meta device and ``to_empty``."""
        if isinstance(self.log_dispersion, nn.Parameter):
            nn.init.zeros_(self.log_dispersion)

    def params(self, recon: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        (mean, *theta), size = self.split(recon, x)
        if self.logits:
            total_count, logits = mean, theta[0]
            mean, theta = total_count * logits.exp(), [total_count]
        elif self.log_dispersion is not None:
            refuse_tracked("log_dispersion", self.log_dispersion)
            theta = [self.log_dispersion.exp()]
        return mean, *theta, size

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        log_mean = 1.5 * torch.randn(*shape, generator=generator) - 1.5
        spread = torch.randn(*shape, generator=generator)
        x = torch.poisson((log_mean + 0.7 * spread - 0.25).exp(), generator)
        theta = (0.7 * torch.randn(*shape, generator=generator)).exp()
        return x, (log_mean.exp(), theta)


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """ln(π [x = 0] + (1 − π) NB(x | m, θ)), π = σ(zero_logits): `NegativeBinomial` with additional
    zeros (Eraslan et al. 2019).

    recon is (mean, dispersion, zero_logits), and with ``size_factor=True`` one tensor more, the
    last. With log_dispersion the dispersion is left out.

    Args:
        log_dispersion, size_factor, eps: as in `NegativeBinomial`.
    """

    def __init__(
        self,
        *,
        log_dispersion: Tensor | int | None = None,
        size_factor: bool = False,
        eps: float = 0.0,
    ) -> None:
        super().__init__(log_dispersion=log_dispersion, size_factor=size_factor, eps=eps)
        self.family = "zero_inflated_negative_binomial"
        self.formula_names = ("mean", "dispersion", "size_factor", "zero_logits")
        names = [name for name in self.param_names if name != "size_factor"]
        self.param_names = (*names, "zero_logits", *(("size_factor",) if size_factor else ()))

    def params(self, recon: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        place = -2 if self.size_factor else -1
        rest = [t for i, t in enumerate(recon) if i != len(recon) + place]
        return *super().params(tuple(rest), x), recon[place]

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, recon = super().sample_inputs(shape, generator)
        zero_logits = 2 * torch.randn(*shape, generator=generator)
        zero = torch.rand(*shape, generator=generator) < zero_logits.sigmoid()
        return x.masked_fill(zero, 0), (*recon, zero_logits)


def poisson_log_rate() -> Poisson:
    """The family by its name: the decoder gives the logarithm of the mean."""
    return Poisson(log_rate=True)
