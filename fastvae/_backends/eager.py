"""The eager backend: plain PyTorch, any device, no compiled code.

Its noise is torch.randn's, so its draws differ from the other backends' under the same seed.
"""

import torch
from torch import Tensor

from fastvae._backends._common import Backend, Prior, Terms, compute_dtype, in_transform
from fastvae.likelihoods import Likelihood


def status() -> Backend:
    return Backend(True, "plain PyTorch on any device")


def rsample(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    generator: torch.Generator | None,
    sample_offset: int,
) -> Tensor:
    if sample_offset:
        raise ValueError("sample_offset needs a counter-based stream, which backend 'eager' lacks")
    dtype = compute_dtype(mu.dtype)
    shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
    eps = torch.randn(shape, dtype=dtype, device=mu.device, generator=generator)
    return (mu.to(dtype) + (0.5 * logvar.to(dtype)).exp() * eps).to(mu.dtype)


def rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    generator: torch.Generator | None,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    z = rsample(mu, logvar, num_samples, generator, sample_offset)
    return z, kl_divergence(mu, logvar, None)


def _phi(d: Tensor) -> Tensor:
    """e^d − 1 − d without cancellation: its series where |d| < 0.25."""
    s = d.clamp(-0.25, 0.25)
    series = torch.full_like(s, 1 / 479001600)
    factorial = 479001600.0
    for k in range(11, 1, -1):
        factorial /= k + 1
        series = series * s + 1 / factorial
    return torch.where(d.abs() < 0.25, series * s * s, d.expm1() - d)


def kl_divergence(mu: Tensor, logvar: Tensor, prior: Prior | None) -> Tensor:
    dtype = compute_dtype(mu.dtype)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    if prior is None:
        kl = 0.5 * (mu.square() + _phi(logvar))
    else:
        prior_mu, prior_logvar = (t.to(dtype) for t in prior)
        distance = (mu - prior_mu).square() * (-prior_logvar).exp()
        kl = 0.5 * (_phi(logvar - prior_logvar) + distance)
    return kl.flatten(1).sum(1) if kl.dim() > 1 else kl


def _check_unit(name: str, t: Tensor, family: str) -> None:
    # A value read back from another device would stall it; a traced one does not exist yet.
    if t.device.type != "cpu" or torch.compiler.is_compiling() or in_transform():
        return
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"{name} must lie in [0, 1] for {family}, got values in [{t.min()}, {t.max()}]"
        )


def log_likelihood(
    x: Tensor, params: tuple[Tensor, ...], likelihood: Likelihood, mask: Tensor | None
) -> Tensor:
    event_dims = x.dim() - 1
    full = params[0].shape
    dtype = compute_dtype(params[0].dtype)
    x, params = x.to(dtype), tuple(p.to(dtype) for p in params)
    if mask is not None:  # zero lies in every domain; a NaN left out must not reach the gradient
        x = torch.where(mask, x, 0)
        params = tuple(torch.where(mask, p, 0) if p.shape == full else p for p in params)
    if likelihood.x_unit:
        _check_unit("x", x, likelihood.family)
    if likelihood.params_unit:
        for name, p in zip(likelihood.param_names, params, strict=True):
            _check_unit(name, p, likelihood.family)
    value = likelihood.log_prob(x, *params)
    if mask is not None:
        value = torch.where(mask, value, 0)
    return value.flatten(-event_dims).sum(-1) if event_dims else value


def elbo(
    x: Tensor,
    params: tuple[Tensor, ...],
    kl: Tensor,
    likelihood: Likelihood,
    mask: Tensor | None,
    weight: Tensor | None,
    beta: float,
    reduction: str,
) -> Terms:
    ll = log_likelihood(x, params, likelihood, mask)
    if ll.dim() == 2:
        ll = ll.mean(0)
    kl = kl.to(torch.promote_types(kl.dtype, ll.dtype))
    parts = (beta * kl - ll, ll.detach(), kl.detach())
    if weight is not None:
        parts = (parts[0] * weight, parts[1] * weight, parts[2] * weight)
    if reduction != "none":
        count = max(x.shape[0], 1) if reduction == "mean" else 1
        parts = (parts[0].sum() / count, parts[1].sum() / count, parts[2].sum() / count)
    return Terms(*parts)
