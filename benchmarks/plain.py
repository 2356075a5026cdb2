"""The contenders' formulas in plain PyTorch, the way people write them in a training script.

fastvae is timed against them; run in float64, they are what every contender is checked against.
A parameter is called what the likelihood calls it: logits, probs, mean, logvar.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LN_2PI = math.log(2 * math.pi)


def elbo(
    logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The whole step head of a Bernoulli VAE: -> z [B, latents], loss []."""
    std = torch.exp(0.5 * logvar)
    eps = torch.randn_like(std) if eps is None else eps
    z = mu + eps * std
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return z, reconstruction / x.shape[0] + kl / x.shape[0]


def rsample(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor]:
    std = torch.exp(0.5 * logvar)
    eps = torch.randn_like(std) if eps is None else eps
    return (mu + eps * std,)


def kl_divergence(mu: Tensor, logvar: Tensor) -> tuple[Tensor]:
    return (-0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1),)


def rsample_kl(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return *rsample(mu, logvar, eps), *kl_divergence(mu, logvar)


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def bernoulli_probs(x: Tensor, probs: Tensor) -> Tensor:
    return -F.binary_cross_entropy(probs, x, reduction="none").sum(1)


def gaussian(x: Tensor, mean: Tensor) -> Tensor:
    return (-0.5 * (x - mean).pow(2) - 0.5 * LN_2PI).sum(1)


def gaussian_logvar(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return (-0.5 * ((x - mean).pow(2) / logvar.exp() + logvar + LN_2PI)).sum(1)


def poisson(x: Tensor, mean: Tensor) -> Tensor:
    return torch.distributions.Poisson(mean, validate_args=False).log_prob(x).sum(1)


def negative_binomial(x: Tensor, mean: Tensor, dispersion: Tensor, eps: float = 1e-8) -> Tensor:
    """As single-cell packages write it."""
    log_total = torch.log(dispersion + mean + eps)
    terms = (
        dispersion * (torch.log(dispersion + eps) - log_total)
        + x * (torch.log(mean + eps) - log_total)
        + torch.lgamma(x + dispersion)
        - torch.lgamma(dispersion)
        - torch.lgamma(x + 1)
    )
    return terms.sum(1)


def zero_inflated_negative_binomial(
    x: Tensor, mean: Tensor, dispersion: Tensor, zero_logits: Tensor, eps: float = 1e-8
) -> Tensor:
    norm = F.softplus(-zero_logits)
    log_theta, log_total = torch.log(dispersion + eps), torch.log(dispersion + mean + eps)
    at_zero = -zero_logits + dispersion * (log_theta - log_total)
    zero = (x < eps).to(x.dtype) * (F.softplus(at_zero) - norm)
    other = (
        at_zero
        - norm
        + x * (torch.log(mean + eps) - log_total)
        + torch.lgamma(x + dispersion)
        - torch.lgamma(dispersion)
        - torch.lgamma(x + 1)
    )
    return (zero + (x > eps).to(x.dtype) * other).sum(1)


def categorical(x: Tensor, logits: Tensor) -> Tensor:
    value = -F.cross_entropy(logits, x.long(), reduction="none")
    return value.flatten(1).sum(1) if value.dim() > 1 else value


LOG_LIKELIHOODS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        bernoulli,
        bernoulli_probs,
        gaussian,
        gaussian_logvar,
        poisson,
        negative_binomial,
        zero_inflated_negative_binomial,
        categorical,
    )
}
