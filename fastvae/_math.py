"""What the formulas in plain PyTorch share, like csrc/math/compounds.h and _triton/math.py."""

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
    """½ (e^d − 1 − d) without cancellation.

    Differentiated is ½ φ(c + t) = ½ φ(c) + ½ expm1(c) expm1(t) + ½ φ(t) at t = 0: the graph holds
    neither the series nor a choice. Beyond 40 e^c is a product: half of it may be a number alone.
    """
    most, beyond = (torch.finfo(d.dtype).max, 700 if d.dtype == torch.float64 else 85)
    c = d.detach()
    near, factor = c.clamp_max(40).exp(), (c - 40).clamp(0, beyond).exp()
    small, series = c.abs() < 1, _half_phi_series(c.clamp(-1, 1))
    half_expm1 = torch.where(small, series + 0.5 * c, 0.5 * near - 0.5)
    value = torch.where(small, series, half_expm1 * factor - 0.5 * c)
    t = d.clamp(-most, most) - c.clamp(-most, most)
    return value + half_expm1 * (t.exp() - 1) * factor + _half_phi_at_0(t.view_as(t))


def _half_phi_at_0(t: Tensor) -> Tensor:
    """½ (e^t − 1 − t) where t is 0. Of a view, whose derivatives, ½ − ½, are summed first."""
    return 0.5 * (t.exp() - 1 - t)


def _half_phi_series(d: Tensor) -> Tensor:
    """½ (e^d − 1 − d) for |d| ≤ 1, to half a rounding."""
    last = 19 if d.dtype == torch.float64 else 12
    series = d / math.factorial(last)
    for k in range(last - 1, 2, -1):
        if type(d) is Tensor:  # in place: a fresh tensor costs more than its elements
            series.add_(1 / math.factorial(k)).mul_(d)
        else:  # an exported program has no operators in place
            series = (series + 1 / math.factorial(k)) * d
    return (0.5 * series + 0.25) * d * d
