"""DiagonalNormal and from_distribution against torch.distributions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

import fastvae
from fastvae import DiagonalNormal, from_distribution

SHAPES = [(5,), (5, 7), (3, 2, 4, 4), (2, 3, 2, 4, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def leaves(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for _ in range(2)]


def torchs(mu: Tensor, logvar: Tensor) -> Independent[Normal]:
    return Independent(Normal(mu, (0.5 * logvar).exp()), mu.dim() - 1)


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], **tolerance: float) -> None:
    """Values, and gradients under the same random upstream one."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    upstream = torch.randn_like(theirs)
    got = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
    want = torch.autograd.grad(theirs, inputs, upstream, retain_graph=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@shapes
def test_moments_entropy_and_shapes(shape: tuple[int, ...]) -> None:
    mu, logvar = leaves(*shape)
    q, p = DiagonalNormal(mu, logvar), torchs(mu, logvar)
    assert (q.batch_shape, q.event_shape) == (p.batch_shape, p.event_shape)
    for name in ("mean", "mode", "stddev", "variance"):
        torch.testing.assert_close(getattr(q, name), getattr(p, name))
    assert_same(q.entropy(), p.entropy(), [logvar])
    assert q.has_rsample
    assert q.support.event_dim == len(shape) - 1


@shapes
@pytest.mark.parametrize("sample_shape", [(), (1,), (4,), (2, 3)], ids=str)
def test_log_prob(shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    mu, logvar = leaves(*shape)
    z = torch.randn(*sample_shape, *shape, dtype=torch.float64).requires_grad_()
    ours, theirs = DiagonalNormal(mu, logvar).log_prob(z), torchs(mu, logvar).log_prob(z)
    assert_same(ours, theirs, [z, mu, logvar])


@shapes
@pytest.mark.parametrize("sample_shape", [(), (1,), (2, 3), (0,)], ids=str)
def test_rsample_draws_what_the_function_does(
    shape: tuple[int, ...], sample_shape: tuple[int, ...]
) -> None:
    mu, logvar = leaves(*shape)
    torch.manual_seed(5)
    z = DiagonalNormal(mu, logvar).rsample(sample_shape)
    assert z.shape == (*sample_shape, *shape)
    torch.manual_seed(5)
    if sample_shape == ():
        want = fastvae.rsample(mu, logvar)
    elif 0 in sample_shape:
        want = mu.new_empty(0, *shape)
    else:
        count = torch.Size(sample_shape).numel()
        want = fastvae.rsample(mu, logvar, num_samples=count).view(*sample_shape, *shape)
    assert torch.equal(z, want)
    assert z.requires_grad == (z.numel() > 0)
    assert not DiagonalNormal(mu, logvar).sample(sample_shape).requires_grad


@shapes
def test_registered_kl_divergences(shape: tuple[int, ...]) -> None:
    mu, logvar = leaves(*shape)
    prior_mu, prior_logvar = leaves(*shape)
    q, p = DiagonalNormal(mu, logvar), DiagonalNormal(prior_mu, prior_logvar)
    normal = Normal(prior_mu, (0.5 * prior_logvar).exp())
    independent = torchs(prior_mu, prior_logvar)
    every = [mu, logvar, prior_mu, prior_logvar]
    forth = kl_divergence(torchs(mu, logvar), independent)
    for prior in (p, normal, independent):
        assert_same(kl_divergence(q, prior), forth, every)
    back = kl_divergence(independent, torchs(mu, logvar))
    for other in (p, normal, independent):
        assert_same(kl_divergence(other, q), back, every)


def test_kl_to_a_scalar_standard_normal_is_the_fused_one() -> None:
    mu, logvar = leaves(6, 9, dtype=torch.float32)
    kl = kl_divergence(DiagonalNormal(mu, logvar), Normal(0.0, 1.0))
    torch.testing.assert_close(kl, fastvae.kl_divergence(mu, logvar))
    names = {node[0].name() for node in kl.grad_fn.next_functions if node[0] is not None}
    assert "KL" in kl.grad_fn.name() or any("KL" in n for n in names), kl.grad_fn.name()


def test_from_distribution_keeps_distribution_and_gradients() -> None:
    loc, scale = torch.randn(4, 6), torch.rand(4, 6) + 0.1
    for leaf in (loc, scale):
        leaf.requires_grad_()
    z = torch.randn(4, 6)
    want = Normal(loc, scale).log_prob(z).sum(1)
    for q in (Normal(loc, scale), Independent(Normal(loc, scale), 1)):
        assert_same(from_distribution(q).log_prob(z), want, [loc, scale])
    q = from_distribution(Normal(loc, scale))
    assert from_distribution(q) is q


def test_from_an_object_with_mean_and_logvar() -> None:
    class Posterior:
        mean, logvar = torch.randn(2, 3), torch.randn(2, 3)

    q = from_distribution(Posterior())
    assert q.mu is Posterior.mean and q.logvar is Posterior.logvar


NORMAL = Normal(torch.zeros(2, 3, 4), 1.0)


@pytest.mark.parametrize(
    "q, error, message",
    [
        (Laplace(torch.zeros(3, 2), 1.0), TypeError, "got Laplace"),
        (LogNormal(torch.zeros(3, 2), 1.0), TypeError, "got LogNormal"),
        (MultivariateNormal(torch.zeros(3, 2), torch.eye(2)), TypeError, "MultivariateNormal"),
        (Independent(Laplace(torch.zeros(3, 2), 1.0), 1), TypeError, "Independent of Laplace"),
        (Categorical(torch.ones(3, 2)), TypeError, "Categorical"),
        (torch.zeros(3, 2), TypeError, "Tensor"),
        (Normal, TypeError, "type"),
        (None, TypeError, "NoneType"),
        (Normal(0.0, 1.0), ValueError, r"batch dimension, got \[\]"),
        (Independent(NORMAL, 1), ValueError, r"batch_shape \[2, 3\]"),
        (Independent(NORMAL, 3), ValueError, r"batch_shape \[\]"),
    ],
)
def test_from_distribution_refuses(q: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_distribution(q)


def test_bad_arguments() -> None:
    mu, logvar = torch.zeros(4, 3), torch.zeros(4, 3)
    q = DiagonalNormal(mu, logvar)
    with pytest.raises(ValueError, match=r"same shape, got \[4, 3\] and \[4, 2\]"):
        DiagonalNormal(mu, torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"value.*int64|x must|mean must.*int64"):
        q.log_prob(torch.zeros(4, 3, dtype=torch.int64))
    for shape in ((3,), (4, 1), (1, 3), (3, 4), ()):
        with pytest.raises(ValueError, match=r"value must have shape \[\*sample_shape, 4, 3\]"):
            q.log_prob(torch.zeros(shape))
    with pytest.raises(ValueError, match="one dimension"):
        q.expand((2, 4))
    with pytest.raises(ValueError, match="event_shape"):
        kl_divergence(q, DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="event_shape"):
        kl_divergence(q, Independent(Normal(torch.zeros(4, 3), 1.0), 2))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, Laplace(0.0, 1.0))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, Independent(Laplace(mu, 1.0), 1))
    with pytest.raises(NotImplementedError):
        kl_divergence(Independent(Laplace(mu, 1.0), 1), q)
    with pytest.raises(ValueError, match="mu"):
        DiagonalNormal(torch.full((4, 3), torch.nan), logvar, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        DiagonalNormal(mu, logvar, validate_args=True).log_prob(torch.full((4, 3), torch.nan))


def test_expand() -> None:
    q = DiagonalNormal(torch.randn(1, 3), torch.randn(1, 3)).expand((5,))
    assert q.batch_shape == (5,)
    z = q.rsample()
    assert z.unique(dim=0).shape == (5, 3)
    torch.testing.assert_close(q.log_prob(z), torchs(q.mu, q.logvar).log_prob(z))
