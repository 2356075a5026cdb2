"""DiagonalNormal and from_distribution against torch.distributions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

import fastvae
from fastvae import DiagonalNormal, from_distribution

SHAPES = [(5,), (5, 7), (3, 2, 4, 4), (2, 3, 2, 4, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def leaves(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2)]


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kl_to_a_scalar_standard_normal_is_the_fused_one(dtype: torch.dtype) -> None:
    mu, logvar = leaves(6, 9, dtype=dtype)
    with torch.profiler.profile() as profile:
        kl = kl_divergence(DiagonalNormal(mu, logvar), Normal(0.0, 1.0))
    assert "fastvae::kl_divergence" in {event.key for event in profile.key_averages()}
    assert not {"aten::exp", "aten::pow"} & {event.key for event in profile.key_averages()}
    torch.testing.assert_close(kl, fastvae.kl_divergence(mu, logvar))


@pytest.mark.parametrize("shapes", [((5,), (4, 5)), ((1, 5), (4, 5)), ((4, 5), (5,)), ((), (4, 5))])
def test_kl_broadcasts_in_both_directions(shapes: tuple[tuple[int, ...], ...]) -> None:
    a, b = (Normal(*(t.exp() for t in leaves(*shape))) for shape in shapes)
    for q, p in ((a, b), (b, a)):
        want = kl_divergence(q, p).sum(1)
        if q.loc.dim() == 2:
            torch.testing.assert_close(kl_divergence(from_distribution(q), p), want)
        if p.loc.dim() == 2:
            torch.testing.assert_close(kl_divergence(q, from_distribution(p)), want)
        if q.loc.dim() == p.loc.dim() == 2:
            ours = kl_divergence(from_distribution(q), from_distribution(p))
            torch.testing.assert_close(ours, want)


def test_kl_to_a_wider_prior_is_computed_in_its_dtype() -> None:
    mu, logvar = torch.zeros(1, 512).bfloat16(), torch.zeros(1, 512).bfloat16()
    p = Normal(torch.zeros(512), torch.full((512,), 1.0035))
    kl = kl_divergence(DiagonalNormal(mu, logvar), p)
    want = kl_divergence(Normal(torch.zeros(512).double(), 1.0), Normal(0.0, p.scale.double()))
    torch.testing.assert_close(kl, want.sum().float()[None], rtol=1e-4, atol=0)


def test_a_mixture_of_them_is_a_prior() -> None:
    """VampPrior's: log_prob broadcasts, as torch's distributions do."""
    mu, logvar = leaves(3, 5)
    z = torch.randn(7, 5, dtype=torch.float64).requires_grad_()
    weights = Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    ours = MixtureSameFamily(weights, DiagonalNormal(mu, logvar))
    theirs = MixtureSameFamily(weights, torchs(mu, logvar))
    assert_same(ours.log_prob(z), theirs.log_prob(z), [z, mu, logvar])
    assert ours.sample((2,)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1, 5), (6, 2, 3, 5)], ids=str)
def test_log_prob_broadcasts(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, dtype=torch.float64).requires_grad_()
    for batch in (3, 1):
        mu, logvar = leaves(batch, 5)
        ours, theirs = DiagonalNormal(mu, logvar).log_prob(z), torchs(mu, logvar).log_prob(z)
        assert_same(ours, theirs, [z, mu, logvar])


@pytest.mark.parametrize("sample_shape", [(0,), (2,), (2, 0), ()], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (3, 0), (0,)], ids=str)
def test_empty(shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    q = DiagonalNormal(torch.zeros(shape), torch.zeros(shape))
    z = q.rsample(sample_shape)
    want = Normal(q.mu, 1.0).log_prob(z)  # an Independent's sum fails on empty tensors
    want = want.sum(-1) if len(shape) > 1 else want
    torch.testing.assert_close(q.log_prob(z), want)


def test_entropy_of_half_precision_is_summed_in_float32() -> None:
    logvar = torch.full((2, 60000), 10.0, dtype=torch.float16)
    entropy = DiagonalNormal(torch.zeros_like(logvar), logvar).entropy()
    want = torchs(torch.zeros(2, 60000), logvar.float()).entropy()
    torch.testing.assert_close(entropy, want)


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


def test_from_a_deterministic_posterior() -> None:
    class Posterior:
        mean, logvar, deterministic = torch.randn(2, 3), torch.zeros(2, 3), True

    with pytest.raises(ValueError, match="deterministic: take its mean"):
        from_distribution(Posterior())


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
    with pytest.raises(TypeError, match=r"value must be floating, got torch.int64"):
        q.log_prob(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="value must be a tensor, got float"):
        q.log_prob(0.5)
    for shape in ((2,), (4, 1), (2, 3), (3, 4), (), (4, 3, 1)):
        with pytest.raises(ValueError, match=r"value must have shape \[\*sample_shape, 4, 3\]"):
            q.log_prob(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"batch_dims = 3 dimensions, got \[4, 3\]"):
        DiagonalNormal(mu, logvar, batch_dims=3)
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


@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
def test_a_batch_of_any_number_of_dimensions(batch_dims: int) -> None:
    mu, logvar = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    q = DiagonalNormal(mu, logvar, batch_dims=batch_dims)
    p = Independent(Normal(mu, (0.5 * logvar).exp()), 3 - batch_dims)
    assert (q.batch_shape, q.event_shape) == (p.batch_shape, p.event_shape)
    assert q.rsample((5,)).shape == p.rsample((5,)).shape
    for value in (p.sample(), p.sample((5,)), p.sample((2, 5)), torch.randn(q.event_shape)):
        torch.testing.assert_close(q.log_prob(value), p.log_prob(value))
    torch.testing.assert_close(q.entropy(), p.entropy())
    prior = Normal(0.5, 2.0)
    want = kl_divergence(p, Independent(Normal(torch.full_like(mu, 0.5), 2.0), 3 - batch_dims))
    torch.testing.assert_close(kl_divergence(q, prior), want)
    torch.testing.assert_close(kl_divergence(q, q), torch.zeros(q.batch_shape))
    wider = q.expand((6, *q.batch_shape))
    assert wider.batch_shape == (6, *q.batch_shape) and wider.event_shape == q.event_shape
    z = wider.rsample()
    torch.testing.assert_close(wider.log_prob(z), p.log_prob(z))


def test_the_batch_dimensions_of_a_distribution() -> None:
    mu, logvar = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    std = (0.5 * logvar).exp()
    for dims in (0, 1, 2):
        want = fastvae.kl_divergence(mu, logvar, batch_dims=dims)
        for q in (
            DiagonalNormal(mu, logvar, batch_dims=dims),
            Independent(Normal(mu, std), 3 - dims),
        ):
            torch.testing.assert_close(fastvae.kl_divergence(q), want)
            torch.testing.assert_close(fastvae.rsample_kl(q, batch_dims=dims)[1], want)
            assert fastvae.rsample(q).shape == mu.shape
            with pytest.raises(ValueError, match=f"q has {dims} batch dimensions, got"):
                fastvae.kl_divergence(q, batch_dims=dims + 1)
    with pytest.raises(ValueError, match="q must have one batch dimension"):
        fastvae.elbo_loss(*torch.rand(2, 2, 5), DiagonalNormal(mu, logvar, batch_dims=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_has_the_dtype_of_its_normal(dtype: torch.dtype) -> None:
    mu, std = torch.randn(3, 4).to(dtype), torch.rand(3, 4).add(0.5).to(dtype)
    assert fastvae.rsample(Normal(mu, std)).dtype == fastvae.rsample(mu, std=std).dtype == dtype
