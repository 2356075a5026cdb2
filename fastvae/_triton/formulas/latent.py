"""Sampling and the KL divergence; csrc/formulas/latent.h in Triton."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter asks for it)

from fastvae._triton.math import exp, phi_expm1


@triton.jit
def standard_kl(inputs, constants):
    """KL(N(μ, e^lv) ‖ N(0, 1)) = ½ (μ² + φ(lv)), φ(lv) = expm1(lv) − lv."""
    mu, logvar = inputs
    phi, expm1 = phi_expm1(logvar)
    return 0.5 * (mu * mu + phi), (mu, 0.5 * expm1)


@triton.jit
def normal_kl(inputs, constants):
    """KL(N(μ, e^lv) ‖ N(μp, e^lvp)) = ½ (φ(lv − lvp) + (μ − μp)² e^−lvp)."""
    mu, logvar, prior_mu, prior_logvar = inputs
    d = mu - prior_mu
    wd = exp(-prior_logvar) * d
    wdd = wd * d
    phi, expm1 = phi_expm1(logvar - prior_logvar)
    return 0.5 * (phi + wdd), (wd, 0.5 * expm1, -wd, -0.5 * (expm1 + wdd))


@triton.jit
def sample(mu, logvar, eps):
    """z = μ + σ ε, σ = e^(lv/2)."""
    return mu + exp(0.5 * logvar) * eps


@triton.jit
def sample_dlogvar(logvar, eps_dz):
    """dlogvar of the sample, given Σ ε·dz over the samples drawn: ½ σ Σ ε dz."""
    return 0.5 * exp(0.5 * logvar) * eps_dz
