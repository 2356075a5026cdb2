"""A model where everything is known in closed form.

p(z) = N(0, I), p(x | z) = N(W z + b, s^2 I). With orthogonal columns of W it has a diagonal
posterior:
    p(z | x) = N(m, diag v), v_j = 1 / (1 + |w_j|^2 / s^2), m_j = v_j w_j . (x - b) / s^2
    p(x) = N(b, W W^T + s^2 I)
so ELBO(q) + KL(q || p(z | x)) = ln p(x) holds for every diagonal q, to rounding.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import fastvae
from fastvae import ELBOLoss
from fastvae.likelihoods import Gaussian

LATENTS, DATA, BATCH, SCALE = 3, 7, 5, 0.6


@dataclass
class Model:
    weight: Tensor  # [DATA, LATENTS], orthogonal columns
    bias: Tensor

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias

    def log_evidence(self, x: Tensor) -> Tensor:
        covariance = self.weight @ self.weight.T + SCALE**2 * torch.eye(DATA, dtype=x.dtype)
        log_p: Tensor = MultivariateNormal(self.bias, covariance).log_prob(x)
        return log_p

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance = 1 / (1 + (self.weight**2).sum(0) / SCALE**2)
        mean = variance * ((x - self.bias) @ self.weight) / SCALE**2
        return mean, variance.log().expand_as(mean)

    def log_weights(
        self, x: Tensor, mu: Tensor, logvar: Tensor, num_samples: int, backend: str
    ) -> Tensor:  # [K, B]: ln p(x, z) - ln q(z | x)
        z = fastvae.rsample(mu, logvar, num_samples=num_samples, backend=backend)
        ll = fastvae.log_likelihood(self.decode(z), x, Gaussian(scale=SCALE), backend=backend)
        log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return ll + log_prior - Normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1)


# Both come after `backend` in a test's arguments: it says on which device tensors are made.
@pytest.fixture
def model() -> Model:
    directions, _ = torch.linalg.qr(torch.randn(DATA, LATENTS, dtype=torch.float64))
    lengths = torch.tensor([0.4, 1.0, 1.7], dtype=torch.float64)
    return Model(directions * lengths, torch.randn(DATA, dtype=torch.float64))


@pytest.fixture
def x() -> Tensor:
    return 1.5 * torch.randn(BATCH, DATA, dtype=torch.float64)


def sigma_points(mu: Tensor, logvar: Tensor) -> Tensor:
    """[2 L, B, L]: points whose mean and covariance are those of N(mu, exp(logvar)). The average
    of a quadratic over them is its expectation, exactly; a Gaussian log-likelihood is one."""
    unit = math.sqrt(LATENTS) * torch.eye(LATENTS, dtype=mu.dtype)
    steps = torch.cat([unit, -unit]).unsqueeze(1)
    return mu + (logvar / 2).exp() * steps


def some_posterior() -> tuple[Tensor, Tensor]:
    mu = torch.randn(BATCH, LATENTS, dtype=torch.float64)
    return mu, 0.8 * torch.randn(BATCH, LATENTS, dtype=torch.float64)


def kl_to_posterior(mu: Tensor, logvar: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    q, p = Normal(mu, (logvar / 2).exp()), Normal(mean, (log_variance / 2).exp())
    return kl_divergence(q, p).sum(-1)


def test_elbo_plus_kl_to_the_posterior_is_the_log_evidence(
    backend: str, model: Model, x: Tensor
) -> None:
    mu, logvar = some_posterior()
    criterion = ELBOLoss(Gaussian(scale=SCALE), reduction="none", backend=backend)
    elbo = -criterion(model.decode(sigma_points(mu, logvar)), x, mu, logvar)
    gap = kl_to_posterior(mu, logvar, *model.posterior(x))
    torch.testing.assert_close(elbo + gap, model.log_evidence(x), rtol=1e-13, atol=1e-13)
    assert (gap > 0.1).all()


def test_elbo_is_tight_at_the_posterior(backend: str, model: Model, x: Tensor) -> None:
    mu, logvar = model.posterior(x)
    criterion = ELBOLoss(Gaussian(scale=SCALE), reduction="none", backend=backend)
    elbo = -criterion(model.decode(sigma_points(mu, logvar)), x, mu, logvar)
    torch.testing.assert_close(elbo, model.log_evidence(x), rtol=1e-13, atol=1e-13)


def test_the_gradient_is_that_of_the_kl_to_the_posterior(
    backend: str, model: Model, x: Tensor
) -> None:
    """-ELBO = KL(q || p(z | x)) - ln p(x), and the evidence doesn't depend on q."""
    leaves = [t.requires_grad_() for t in some_posterior()]
    criterion = ELBOLoss(Gaussian(scale=SCALE), reduction="sum", backend=backend)
    loss = criterion(model.decode(sigma_points(*leaves)), x, *leaves)
    gap = kl_to_posterior(*leaves, *model.posterior(x)).sum()
    for ours, exact in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(gap, leaves), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_the_posterior_as_a_prior_gives_the_gap(backend: str, model: Model, x: Tensor) -> None:
    mu, logvar = some_posterior()
    posterior = model.posterior(x)
    ours = fastvae.kl_divergence(mu, logvar, prior=posterior, backend=backend)
    torch.testing.assert_close(
        ours, kl_to_posterior(mu, logvar, *posterior), rtol=1e-13, atol=1e-13
    )


def test_every_importance_weight_is_the_evidence_when_q_is_the_posterior(
    backend: str, model: Model, x: Tensor
) -> None:
    mu, logvar = model.posterior(x)
    log_w = model.log_weights(x, mu, logvar, 64, backend)
    expected = model.log_evidence(x).expand(64, BATCH)
    torch.testing.assert_close(log_w, expected, rtol=1e-12, atol=1e-12)


def test_importance_weighted_bound_rises_to_the_log_evidence(
    quick_backend: str, model: Model, x: Tensor
) -> None:
    """Every bound from the same 128 draws, so that they differ by little noise. All limits are 5
    standard errors over 4000 independent repetitions."""
    repeats, most = 4000, 128
    one = x[:1].expand(repeats, DATA)
    mean, log_variance = model.posterior(one)
    mu, logvar = (mean + 0.3, log_variance + 0.4)  # wider than the posterior: weights are bounded
    log_w = model.log_weights(one, mu, logvar, most, quick_backend)
    evidence = model.log_evidence(one)[0]

    def bound(k: int) -> Tensor:  # [repeats]: the mean over the groups of k draws
        grouped = log_w.view(most // k, k, repeats)
        return (torch.logsumexp(grouped, 1) - math.log(k)).mean(0)

    def error(values: Tensor) -> Tensor:
        return 5 * values.std() / math.sqrt(repeats)

    bounds = {k: bound(k) for k in (1, 2, 8, 32, 128)}
    elbo = evidence - kl_to_posterior(mu, logvar, mean, log_variance)[0]
    assert (bounds[1].mean() - elbo).abs() < error(bounds[1])
    sizes = list(bounds)
    for small, large in itertools.pairwise(sizes):
        gain = bounds[large] - bounds[small]
        assert gain.mean() > error(gain), f"IWAE-{large} is not above IWAE-{small}"
    for k, values in bounds.items():
        assert values.mean() < evidence + error(values), f"IWAE-{k} exceeds ln p(x)"
    # the gap at large K is var(w) / (2 K p(x)^2); half as much again covers the next order
    relative = (log_w - evidence).exp()
    assert (relative.mean() - 1).abs() < error(relative.mean(0))
    gap = evidence - bounds[most].mean()
    assert gap < 1.5 * relative.var() / (2 * most) + error(bounds[most])
