"""What the formulas in plain PyTorch share; csrc/cpu/vec.h in C++, _triton/math.py in Triton."""

import math

import torch
from torch import Tensor


def half_square(a: Tensor, logvar: Tensor) -> Tensor:
    """½ a² e^−logvar, finite wherever that is a number; 0 where a is 0. Float32 and float64.

    a is scaled before it is squared. The derivative by logvar is taken through e^(l₀ − l) at
    l = l₀, which is one: through the roots it would overflow before the result does.
    """
    logvar = _clamped(logvar)
    fixed = logvar.detach()
    root = (-0.25 * fixed).exp()
    u = a * root * root
    return (0.5 * u * (fixed - logvar).exp()) * u  # in this order: not a tangent of 0 times ∞


def times_sigma(a: Tensor, logvar: Tensor) -> Tensor:
    """a e^(logvar / 2), likewise."""
    logvar = _clamped(logvar)
    fixed = logvar.detach()
    root = (0.25 * fixed).exp()
    return a * root * root * (0.5 * (logvar - fixed)).exp()


def _clamped(logvar: Tensor) -> Tensor:
    """To where no product with e^±logvar is anything but 0 or ∞."""
    limit = 2800.0 if logvar.dtype == torch.float64 else 348.0
    return logvar.clamp(-limit, limit)


def times_beta(kl: Tensor, beta: Tensor | float) -> Tensor:
    """β KL, but 0 where β is 0, whatever the KL there; differentiable in both."""
    # A tensor: a comparison of numbers would be a guard of the compiled graph, as new_full is.
    b = beta.reshape(()) if isinstance(beta, Tensor) else kl.new_ones(()) * beta
    return torch.where(kl.isfinite() | (b != 0), kl, 0) * b


def half_phi(d: Tensor) -> Tensor:
    """½ (e^d − 1 − d) without cancellation: its series where |d| < 1 (d^20 / 20! is below 1e-18).
    Beyond 40 by the root of e^d, as half of it may be a number alone."""
    s = d.clamp(-1, 1)
    series = torch.full_like(s, 1 / math.factorial(20))
    for k in range(19, 1, -1):
        series = series * s + 1 / math.factorial(k)
    d = d.clamp_max(torch.finfo(d.dtype).max)  # else ∞ − ∞
    fixed = d.detach()
    root = (0.5 * fixed).exp()
    large = (0.5 * root * (d - fixed).exp()) * root
    # clamp_max's derivative at its bound is 1 or 0, by torch's version: the bound lies beyond 40.
    expm1 = torch.where(d > 40, large, 0.5 * d.clamp_max(41).expm1())
    return torch.where(d.abs() < 1, 0.5 * series * s * s, expm1 - 0.5 * d)
