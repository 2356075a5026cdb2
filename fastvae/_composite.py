"""Row formulas in plain PyTorch: what eager runs, and through operators that csrc/ops.cpp declares
what double backward, forward-mode derivatives and torch.func see of the kernels.

A likelihood's formula is with its class; the KL's are here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae._math import half_phi, half_square, times_sigma
from fastvae.likelihoods._base import formula, formulas, sites


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are computed in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@formula
def standard_kl(options: Sequence[float], mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, e^lv) ‖ N(0, 1)) = ½ (μ² + φ(lv)), φ(lv) = expm1(lv) − lv"""
    return 0.5 * mu * mu + half_phi(logvar)


@formula
def normal_kl(
    options: Sequence[float], mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor
) -> Tensor:
    """KL(N(μ, e^lv) ‖ N(μp, e^lvp)) = ½ (φ(lv − lvp) + (μ − μp)² e^−lvp)"""
    return half_phi(logvar - prior_logvar) + half_square(mu - prior_mu, prior_logvar)


def rows(
    inputs: Sequence[Tensor], family: str, options: Sequence[float], mask: Tensor | None = None
) -> Tensor:
    """The formula of [x, *params], summed over the event dimensions of x [B, *event]."""
    event_dims = inputs[0].dim() - 1
    full = inputs[1].shape
    dtype = compute_dtype(inputs[1].dtype)
    x, *params = (t.to(dtype) for t in inputs)
    if mask is not None:  # what lies in every domain: a NaN left out must not reach the gradient
        x = torch.where(mask, x, 0)
        of_params = mask.unsqueeze(1) if family in sites else mask
        params = [torch.where(of_params, p, 0.5) if p.shape == full else p for p in params]
    value = formulas[family](options, x, *params)
    if mask is not None:
        value = torch.where(mask, value, 0)
    return value.flatten(-event_dims).sum(-1) if event_dims else value


def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = μ + e^(lv / 2) ε, in the dtype of μ."""
    dtype = compute_dtype(mu.dtype)
    return (mu.to(dtype) + times_sigma(eps.to(dtype), logvar.to(dtype))).to(mu.dtype)
