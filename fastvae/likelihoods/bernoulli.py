"""Bernoulli likelihoods; targets anywhere in [0, 1]. Formulas: csrc/formulas/bernoulli.h."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.likelihoods._base import Likelihood, formula, number


@formula
def bernoulli(options: Sequence[float], x: Tensor, logits: Tensor) -> Tensor:
    """ln p(x | l) = x ln σ(l) + (1 − x) ln σ(−l)"""
    return x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)


@formula
def bernoulli_probs(options: Sequence[float], x: Tensor, p: Tensor) -> Tensor:
    """ln p(x | p) = x max(ln p, m) + (1 − x) max(ln(1 − p), m).

    With BCELoss's derivatives, which see no clamp, and p (1 − p) no smaller than 1e-12. To every
    order: where that floor acts the logarithms' derivative is that of a parabola, moved
    onto the value.
    """
    (log_min,) = options
    inside = p * (1 - p) >= 1e-12
    safe = torch.where(inside, p, 0.5)
    log_p = torch.where(inside, safe.log(), 1e12 * (p - 0.5 * p * p))
    log_q = torch.where(inside, torch.log1p(-safe), -0.5e12 * p * p)
    fixed = p.detach()
    log_p = fixed.log().clamp_min(log_min) + (log_p - log_p.detach())
    log_q = torch.log1p(-fixed).clamp_min(log_min) + (log_q - log_q.detach())
    return x * log_p + (1 - x) * log_q


class Bernoulli(Likelihood):
    """ln p(x | l) = x ln σ(l) + (1 − x) ln σ(−l), from the decoder's logits l.

    Equals ``-binary_cross_entropy_with_logits``. x may be continuous in [0, 1], the usual
    convention for grey values (Kingma & Welling 2014, appendix C.1).
    """

    family = "bernoulli"
    param_names = formula_names = ("logits",)
    domains: ClassVar[dict[str, str]] = {"x": "unit"}

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = torch.rand(*shape, generator=generator)
        return x, (3 * torch.randn(*shape, generator=generator),)


class BernoulliProbs(Likelihood):
    """ln p(x | p) = x ln p + (1 − x) ln(1 − p), from probabilities, as older decoders emit them.

    Args:
        log_min: each logarithm is clamped from below here, in nats. The default is that of
            ``torch.nn.BCELoss``, which this family equals in value and gradient.

    Raises:
        ValueError: log_min is not a finite negative number.
    """

    family = "bernoulli_probs"
    param_names = formula_names = ("probs",)
    domains: ClassVar[dict[str, str]] = {"x": "unit", "probs": "unit"}

    def __init__(self, log_min: float = -100.0) -> None:
        super().__init__()
        self.log_min = number("log_min", log_min)
        if not -3e38 < self.log_min < 0:
            raise ValueError(f"log_min must be a finite negative number, got {log_min}")

    @property
    def options(self) -> Sequence[float]:
        return (self.log_min,)

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, (logits,) = Bernoulli().sample_inputs(shape, generator)
        return x, (logits.sigmoid(),)

    def extra_repr(self) -> str:
        return f"log_min={self.log_min}"
