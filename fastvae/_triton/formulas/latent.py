"""Sampling and the KL divergence; csrc/formulas/latent.h in Triton."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter asks for it)

from fastvae._triton.math import exp_factor, half_phi_expm1, times


@triton.jit
def standard_kl(inputs, options):
    """KL(N(μ, e^lv) ‖ N(0, 1)) = ½ (μ² + φ(lv)), φ(lv) = expm1(lv) − lv."""
    mu, logvar = inputs
    half_phi, half_expm1 = half_phi_expm1(logvar)
    return 0.5 * mu * mu + half_phi, (mu, half_expm1)


@triton.jit
def normal_kl(inputs, options):
    """KL(N(μ, e^lv) ‖ N(μp, e^lvp)) = ½ (φ(lv − lvp) + (μ − μp)² e^−lvp), the distance scaled
    before it is squared."""
    mu, logvar, prior_mu, prior_logvar = inputs
    precision = exp_factor(-0.5 * prior_logvar)  # 1/σp
    u = times(mu - prior_mu, precision)
    g = times(u, precision)
    distance = 0.5 * u * u
    half_phi, half_expm1 = half_phi_expm1(logvar - prior_logvar)
    return half_phi + distance, (g, half_expm1, -g, -(half_expm1 + distance))


@triton.jit
def sample(mu, logvar, eps):
    """z = μ + σ ε, σ = e^(lv/2)."""
    return mu + times(eps, exp_factor(0.5 * logvar))


@triton.jit
def sample_dlogvar(logvar, eps_dz):
    """dlogvar of the sample, given Σ ε·dz over the samples drawn: ½ σ Σ ε dz."""
    return 0.5 * times(eps_dz, exp_factor(0.5 * logvar))
