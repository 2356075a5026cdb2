"""What the formulas in plain PyTorch share; csrc/cpu/vec.h in C++, _triton/math.py in Triton."""

import math

import torch
from torch import Tensor


def times_exp(a: Tensor, x: Tensor) -> Tensor:
    """a e^x, finite wherever that is a number, though e^x may be none; 0 · e^x is 0 for every x.

    For float32 and float64. The derivatives are taken through e^(x − x₀) at x = x₀, which is one:
    through the halves they would overflow before the result does.
    """
    limit = 1400.0 if x.dtype == torch.float64 else 174.0  # beyond, the product's square is 0 or ∞
    x = x.clamp(-limit, limit)
    fixed = x.detach()
    half = (0.5 * fixed).exp()
    return a * half * half * (x - fixed).exp()


def times_beta(kl: Tensor, beta: Tensor | float) -> Tensor:
    """β KL, but 0 where β is 0 and the KL infinite; differentiable in both."""
    product = kl * beta
    return torch.where(kl.isinf() & product.isnan(), 0, product)


def half_phi(d: Tensor) -> Tensor:
    """½ (e^d − 1 − d) without cancellation: its series where |d| < 1 (d^20 / 20! is below 1e-18).
    Beyond 40 by the root of e^d, as half of it may be a number alone."""
    s = d.clamp(-1, 1)
    series = torch.full_like(s, 1 / math.factorial(20))
    for k in range(19, 1, -1):
        series = series * s + 1 / math.factorial(k)
    root = (0.5 * d).exp()
    expm1 = torch.where(d > 40, 0.5 * root * root, 0.5 * d.clamp_max(40).expm1())
    return torch.where(d.abs() < 1, 0.5 * series * s * s, expm1 - 0.5 * d)
