"""Bernoulli likelihoods; targets anywhere in [0, 1]. Formulas: csrc/formulas/bernoulli.h."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.likelihoods._base import Likelihood, number


class Bernoulli(Likelihood):
    """ln p(x | l) = x ln σ(l) + (1 − x) ln σ(−l), from the decoder's logits l.

    Equals ``-binary_cross_entropy_with_logits``. x may be continuous in [0, 1], the usual
    convention for grey values (Kingma & Welling 2014, appendix C.1).
    """

    family = "bernoulli"
    param_names = ("logits",)
    x_unit = True

    def log_prob(self, x: Tensor, *params: Tensor) -> Tensor:
        (logits,) = params
        return x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = torch.rand(*shape, generator=generator)
        return x, (3 * torch.randn(*shape, generator=generator),)


class _ClampedLogs(torch.autograd.Function):
    """max(ln p, m) and max(ln(1 − p), m), with BCELoss's gradient: its floor of 1e-12, no clamp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, log_min: float) -> tuple[Tensor, Tensor]:
        return p.log().clamp_min(log_min), (-p).log1p().clamp_min(log_min)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return (grads[0] * (1 - p) - grads[1] * p) / (p * (1 - p)).clamp_min(1e-12), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        (p,) = ctx.saved_tensors
        scaled = tangents[0] / (p * (1 - p)).clamp_min(1e-12)
        return scaled * (1 - p), -scaled * p


class BernoulliProbs(Likelihood):
    """ln p(x | p) = x ln p + (1 − x) ln(1 − p), from probabilities, as older decoders emit them.

    Args:
        log_min: each logarithm is clamped from below here, in nats. The default is that of
            ``torch.nn.BCELoss``, which this family equals in value and gradient.

    Raises:
        ValueError: log_min is not a finite negative number.
    """

    family = "bernoulli_probs"
    param_names = ("probs",)
    x_unit = True
    params_unit = True

    def __init__(self, log_min: float = -100.0) -> None:
        super().__init__()
        self.log_min = number("log_min", log_min)
        if not -3e38 < self.log_min < 0:
            raise ValueError(f"log_min must be a finite negative number, got {log_min}")

    @property
    def options(self) -> Sequence[float]:
        return (self.log_min,)

    def log_prob(self, x: Tensor, *params: Tensor) -> Tensor:
        (p,) = params
        log_p, log_q = _ClampedLogs.apply(p, self.log_min)
        value: Tensor = x * log_p + (1 - x) * log_q
        return value

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, (logits,) = Bernoulli().sample_inputs(shape, generator)
        return x, (logits.sigmoid(),)

    def extra_repr(self) -> str:
        return f"log_min={self.log_min}"
