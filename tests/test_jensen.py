"""Jensen's inequality on a trained model and held-out digits: ELBO < IWAE-5 < IWAE-50 < ln p(x).

The model of examples/digits.py with two latents: ln p(x) is then an integral over a plane, which a
grid gives to rounding. Every bound has draws of its own. From shared ones ELBO <= IWAE-5 <= IWAE-50
would be a matter of algebra, whatever the weights.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import fastvae

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

DIGITS, EPOCHS = 100, 15
EDGE, STEP = 6.0, 0.1  # of the grid; beyond 6 lies 1e-8 of the prior


@dataclass
class Draws:
    """K draws, R times, for B digits."""

    log_px: Tensor  # ln p(x | z), [K, R, B]
    log_ratio: Tensor  # ln p(z) - ln q(z | x), [K, R, B]
    kl: Tensor  # of q from the prior, [B]


@dataclass
class Trained:
    model: Any
    likelihood: fastvae.likelihoods.Likelihood
    x: Tensor  # [B, 64], held out

    def log_px(self, z: Tensor) -> Tensor:  # [N, B, 2] or [N, 1, 2] -> [N, B]
        recon = self.model.decoder(z).expand(-1, *self.x.shape)
        return fastvae.log_likelihood(x=self.x, recon=recon, likelihood=self.likelihood)

    def draw(self, k: int, repeats: int, wider: float = 1.0) -> Draws:
        """From q(z | x), its deviations multiplied by `wider`."""
        mu, logvar = self.model.encode(self.x)
        logvar = logvar + 2 * math.log(wider)
        z, kl = fastvae.rsample_kl(mu, logvar, num_samples=k * repeats)
        log_q = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1)
        log_ratio = Normal(0.0, 1.0).log_prob(z).sum(-1) - log_q
        shape = (k, repeats, len(self.x))
        return Draws(self.log_px(z).view(shape), log_ratio.view(shape), kl)

    def on_grid(self, shift: float) -> tuple[Tensor, Tensor]:
        """z [N, 2], and ln p(x, z) + ln STEP^2 [N, B]: their sum over the grid is p(x)."""
        axis = torch.arange(-EDGE, EDGE, STEP, dtype=torch.float64) + shift
        z = torch.cartesian_prod(axis, axis)
        log_px = torch.cat([self.log_px(part.unsqueeze(1)) for part in z.split(2048)])
        log_pz = Normal(0.0, 1.0).log_prob(z).sum(-1, keepdim=True)
        return z, log_px + log_pz + 2 * math.log(STEP)


@pytest.fixture(scope="module")
def trained(one_thread: None) -> Iterator[Trained]:
    digits = importlib.import_module("digits")
    train, held_out = digits.load(seed=0)
    likelihood, _ = digits.family("gaussian")
    model = digits.VAE(latents=2)
    for _ in digits.fit(model, likelihood, train, held_out, EPOCHS, batch=64):
        pass
    model.eval().double()
    with torch.no_grad():
        yield Trained(model, likelihood.double(), held_out[:DIGITS].double())


@pytest.fixture(scope="module")
def log_evidence(trained: Trained) -> Tensor:  # [B]
    _, log_pxz = trained.on_grid(shift=0.0)
    return log_pxz.logsumexp(0)


@pytest.fixture(scope="module")
def draws(trained: Trained) -> dict[str, Draws]:
    torch.manual_seed(1)
    sizes = {"ELBO": 5, "IWAE-5": 5, "IWAE-50": 50}
    drawn = {name: trained.draw(k, repeats=20) for name, k in sizes.items()}
    # Of the encoder's q the weights have a few huge values among them, of a wider one not.
    return drawn | {"wide": trained.draw(100, repeats=20, wider=2.0)}


def test_the_grid_gives_the_integral(trained: Trained, log_evidence: Tensor) -> None:
    """Points between the points give the same, and nothing happens at the edge."""
    z, log_pxz = trained.on_grid(shift=STEP / 2)
    torch.testing.assert_close(log_pxz.logsumexp(0), log_evidence, rtol=0, atol=1e-9)
    outside = log_pxz[z.abs().amax(1) > EDGE - 1].logsumexp(0)
    assert (outside < log_evidence + math.log(1e-4)).all()


Bound = Callable[[Draws], Tensor]  # [R, B]


def importance_weighted(d: Draws) -> Tensor:
    return (d.log_px + d.log_ratio).logsumexp(0) - math.log(len(d.log_px))


def standard_error(values: Tensor) -> Tensor:
    return values.std() / math.sqrt(len(values))


def check(draws: dict[str, Draws], log_evidence: Tensor, bound: Bound) -> None:
    """Each gap of the chain, a mean over digits, is more than 5 standard errors of its draws; and
    E[exp(bound)] = p(x) to 5 of them, as the mean weight is unbiased for any K and q."""
    elbo = draws["ELBO"].log_px.mean(0) - draws["ELBO"].kl
    iwae = {name: bound(draws[name]) for name in ("IWAE-5", "IWAE-50")}
    chain = {"ELBO": elbo, **iwae, "ln p(x)": log_evidence.expand_as(elbo)}
    print(*(f"{name} {values.mean():.2f}" for name, values in chain.items()), sep="   ")
    for (low, lower), (high, upper) in itertools.pairwise(chain.items()):
        gap = (upper - lower).mean(1)  # [R]
        error = standard_error(gap)
        assert gap.mean() > 5 * error, f"{low} is not below {high}: {gap.mean():.3f} ± {error:.3f}"
    ratio = (bound(draws["wide"]) - log_evidence).exp().mean(1)  # [R]
    error = standard_error(ratio)
    assert abs(ratio.mean() - 1) < 5 * error, f"p(x) is off: {ratio.mean():.3f} ± {error:.3f}"


def test_jensen(draws: dict[str, Draws], log_evidence: Tensor) -> None:
    check(draws, log_evidence, importance_weighted)


def over_digits(d: Draws) -> Tensor:
    log_w = d.log_px + d.log_ratio
    return log_w.logsumexp(2, keepdim=True).mean(0).expand(log_w.shape[1:]) - math.log(DIGITS)


# What a wrong bound is, and which link of the chain gives it away.
WRONG: dict[str, tuple[Bound, str]] = {
    "logarithms averaged": (lambda d: (d.log_px + d.log_ratio).mean(0), "ELBO is not below IWAE-5"),
    "averaged over digits": (over_digits, "IWAE-5 is not below IWAE-50"),
    "a sum": (lambda d: (d.log_px + d.log_ratio).logsumexp(0), "IWAE-50 is not below ln p"),
    "no p(z) / q(z | x)": (
        lambda d: d.log_px.logsumexp(0) - math.log(len(d.log_px)),
        "IWAE-50 is not below ln p",
    ),
    "q(z | x) / p(z)": (
        lambda d: (d.log_px - d.log_ratio).logsumexp(0) - math.log(len(d.log_px)),
        "IWAE-50 is not below ln p",
    ),
    "KL in place of the ratio": (
        lambda d: d.log_px.logsumexp(0) - math.log(len(d.log_px)) - d.kl,
        "p.x. is off",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_bound_is_found(name: str, draws: dict[str, Draws], log_evidence: Tensor) -> None:
    bound, verdict = WRONG[name]
    with pytest.raises(AssertionError, match=verdict):
        check(draws, log_evidence, bound)
