"""fastvae: fused kernels for the evidence lower bound of variational autoencoders."""

from fastvae import export, likelihoods, schedules
from fastvae._backends import Backend, Terms, backends
from fastvae._backends.cpp import empty_cache
from fastvae.diagnostics import Diagnosis, diagnose
from fastvae.distributions import DiagonalNormal, from_distribution
from fastvae.functional import kl_divergence, log_likelihood, rsample, rsample_kl
from fastvae.loss import elbo_loss, elbo_terms
from fastvae.modules import ELBOLoss

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Diagnosis",
    "DiagonalNormal",
    "ELBOLoss",
    "Terms",
    "backends",
    "diagnose",
    "elbo_loss",
    "elbo_terms",
    "empty_cache",
    "export",
    "from_distribution",
    "kl_divergence",
    "likelihoods",
    "log_likelihood",
    "rsample",
    "rsample_kl",
    "schedules",
]
