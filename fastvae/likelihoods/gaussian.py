"""Gaussian likelihoods. Formulas: csrc/formulas/gaussian.h."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastvae._math import half_square
from fastvae.likelihoods._base import Likelihood, formula, number, refuse_tracked

_HALF_LN_2PI = 0.5 * math.log(2 * math.pi)


@formula
def gaussian(options: Sequence[float], x: Tensor, mean: Tensor) -> Tensor:
    """ln p(x | m) = c − ½ w (x − m)², w = 1/scale²"""
    precision, constant = options
    d = x - mean
    return constant - 0.5 * (precision * d) * d  # d² may be no number where this is


@formula
def gaussian_logvar(options: Sequence[float], x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """ln p(x | m, lv) = −½ (lv + (x − m)² e^−lv) + c"""
    return -0.5 * logvar - half_square(x - mean, logvar) + options[0]


class Gaussian(Likelihood):
    """ln N(x; mean, σ²), from the decoder's mean.

    Args:
        scale: the fixed σ (default 1). Not together with ``logvar``.
        normalized: False drops the constant −ln σ − ½ ln 2π of each element, so that −ln p is the
            half squared error over σ². Fixed scale only.
        logvar: ln σ² instead of a fixed scale:
            ``"learned"``, one parameter of this module, ``logvar`` of shape [1], that starts at 0
            (σ-VAE, Rybkin et al. 2021);
            a tensor that broadcasts to the event shape (registered as a buffer, or as a parameter
            if it is an ``nn.Parameter``; a tensor that requires grad receives its gradient);
            ``"per_element"``, the decoder gives it: recon is the pair (mean, logvar).

    Raises:
        ValueError: scale is not in [1e-18, 1e18]; scale or normalized together with logvar;
            an unknown logvar name.
    """

    def __init__(
        self,
        scale: float | None = None,
        normalized: bool = True,
        *,
        logvar: Tensor | Literal["learned", "per_element"] | None = None,
    ) -> None:
        super().__init__()
        if logvar is not None and (scale is not None or not normalized):
            raise ValueError("scale and normalized belong to a fixed scale, got logvar as well")
        self.scale = 1.0 if scale is None else number("scale", scale, " (logvar= takes tensors)")
        if not 1e-18 <= self.scale <= 1e18:  # 1 / scale² must be a float32
            raise ValueError(f"scale must be in [1e-18, 1e18], got {scale}")
        self.normalized = normalized
        self.family = "gaussian" if logvar is None else "gaussian_logvar"
        self.param_names = self.formula_names = ("mean",)
        self.learned = isinstance(logvar, str) and logvar == "learned"
        self.logvar: Tensor | None = None
        if isinstance(logvar, nn.Parameter):
            self.logvar = logvar
        elif isinstance(logvar, Tensor):
            del self.logvar
            self.register_buffer("logvar", logvar)
        elif logvar is not None and not isinstance(logvar, str):
            raise TypeError(f"logvar must be a tensor or a name, got {type(logvar).__name__}")
        elif self.learned:
            self.logvar = nn.Parameter(torch.empty(1))  # FSDP2 shards no scalars
            self.reset_parameters()
        elif logvar == "per_element":
            self.param_names = self.formula_names = ("mean", "logvar")
        elif logvar is not None:
            raise ValueError(f"logvar must be 'learned', 'per_element' or a tensor, got {logvar!r}")
        if self.logvar is not None:
            if not self.logvar.is_floating_point():
                raise TypeError(f"logvar must be a floating tensor, got {self.logvar.dtype}")
            self.formula_names = ("mean", "logvar")

    def reset_parameters(self) -> None:
        """Sets a learned log-variance to its start, 0: after the meta device and ``to_empty``."""
        if self.learned and self.logvar is not None:
            nn.init.zeros_(self.logvar)

    @property
    def options(self) -> Sequence[float]:
        if self.family == "gaussian_logvar":
            return (-_HALF_LN_2PI,)
        constant = -math.log(self.scale) - _HALF_LN_2PI if self.normalized else 0.0
        return (self.scale**-2, constant)

    def params(self, recon: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        if self.logvar is None:
            return recon
        refuse_tracked("logvar", self.logvar)
        return (*recon, self.logvar)

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, *recon = (torch.randn(*shape, generator=generator) for _ in ("x", *self.param_names))
        return x, tuple(recon)

    def extra_repr(self) -> str:
        if self.family == "gaussian":
            return f"scale={self.scale}, normalized={self.normalized}"
        return (
            "logvar='per_element'" if self.logvar is None else f"logvar={list(self.logvar.shape)}"
        )


def gaussian_per_element() -> Gaussian:
    """The family by its name: mean and log-variance both from the decoder."""
    return Gaussian(logvar="per_element")
