"""What names a diagonal normal, and where its KL is summed: std and log_std, distributions, batch
dimensions, masks, per dimension and element, free bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
from cases import assert_within, compute_dtype, run, upstream_like
from test_latent import dtypes, latents
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import fastvae
from fastvae import DiagonalNormal, reference

SEED = 11
EPS = torch.finfo(torch.float32).eps


def kl_oracle(mu: Tensor, logvar: Tensor, *prior: Tensor) -> Tensor:
    return reference.kl_elementwise(mu, logvar, prior or None)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- std and log_std

ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "std": lambda std: 2 * std.double().log(),
    "log_std": lambda log_std: 2 * log_std.double(),
}
routes = pytest.mark.parametrize("name", ROUTES)


def spread(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    t = 0.7 * torch.randn(shape)
    return (t.exp() if name == "std" else t).to(dtype)


@dtypes
@routes
def test_std_and_log_std_in_place_of_logvar(name: str, dtype: torch.dtype, backend: str) -> None:
    mu = latents((6, 23), dtype)[0]
    given = spread(name, (6, 23), dtype)
    eps = fastvae.rsample(*torch.zeros(2, 6, 23).double(), seed=SEED, backend=backend)
    upstream = upstream_like((6, 23)).to(dtype)

    def ours(m: Tensor, s: Tensor) -> Tensor:
        return fastvae.rsample(m, **{name: s}, seed=SEED, backend=backend)

    def oracle(m: Tensor, s: Tensor) -> Tensor:
        return m + (ROUTES[name](s) / 2).exp() * eps

    z, grads = run(ours, [mu, given], upstream)
    want, want_grads = run(oracle, [mu.double(), given.double()], upstream.double())
    rounding = torch.finfo(dtype).eps + 8 * torch.finfo(compute_dtype(dtype)).eps
    assert z.dtype == dtype and all(g.dtype == dtype for g in grads)
    assert_within(z, want, rounding * (mu.double().abs() + (want - mu).abs()), what="z")
    for got, exact in zip(grads, want_grads, strict=True):
        assert_within(got, exact, rounding * exact.abs(), what="gradient of z")

    upstream = upstream_like((6,))

    def ours_kl(m: Tensor, s: Tensor) -> Tensor:
        return fastvae.kl_divergence(m, **{name: s}, backend=backend)

    kl, grads = run(ours_kl, [mu, given], upstream)
    want, want_grads = run(
        lambda m, s: kl_oracle(m, ROUTES[name](s)).sum(1), [mu.double(), given.double()], upstream
    )
    assert kl.dtype == compute_dtype(dtype)
    assert_within(kl, want, 16 * torch.finfo(kl.dtype).eps * want, what="kl")
    # σ − 1/σ and σ² − 1 cancel near σ = 1: as large as their terms.
    sigma = (ROUTES[name](given) / 2).exp()
    size = [mu.double().abs(), sigma + 1 / sigma if name == "std" else sigma**2 + 1]
    for got, exact, of in zip(grads, want_grads, size, strict=True):
        assert_within(got, exact, rounding * of * upstream[:, None].double(), what="gradient of kl")
    fused = fastvae.rsample_kl(mu, **{name: given}, seed=SEED, backend=backend)
    assert torch.equal(fused[0], z) and fused[0].dtype == dtype
    torch.testing.assert_close(fused[1], kl, rtol=8 * EPS, atol=0)


def test_std_under_autocast() -> None:
    """The wider of two dtypes is the sample's, as with a logvar."""
    mu, std = torch.randn(3, 4).bfloat16(), torch.rand(3, 4) + 0.5
    with torch.autocast("cpu"):
        for a, b in ((mu, std), (mu.float(), std.bfloat16()), (mu, std.bfloat16())):
            wide = torch.promote_types(a.dtype, b.dtype)
            assert fastvae.rsample(a, std=b).dtype == fastvae.rsample(a, b).dtype == wide


def test_kl_of_std_near_one_and_down_to_the_smallest(backend: str) -> None:
    """½ (σ² − 1 − 2 ln σ) cancels near 1, and σ² underflows below 1e-19."""
    close = 1 + torch.tensor([0.0, 1e-6, -1e-6, 1e-4, -1e-3, 0.02, -0.3, 0.5])
    std = torch.cat([close, torch.tensor([1e-38, 1e-30, 1e-19, 1e-5, 30.0, 1e4])])
    kl = fastvae.kl_divergence(torch.zeros_like(std), std=std, backend=backend)
    with mpmath.workdps(40):
        exact = [
            float((mpmath.mpf(s) ** 2 - 1 - 2 * mpmath.log(mpmath.mpf(s))) / 2)
            for s in std.tolist()
        ]
    expected = torch.tensor(exact, dtype=torch.float64)
    assert_within(kl, expected, 6 * EPS * expected, what="kl")


@pytest.mark.parametrize("bad", [0.0, -1e-3])
def test_a_std_that_is_not_above_zero(bad: float, quick_backend: str) -> None:
    std = torch.ones(3, 4)
    std[1, 2] = bad
    for function in (fastvae.rsample, fastvae.rsample_kl, fastvae.kl_divergence):
        if std.is_cpu:
            with pytest.raises(ValueError, match=rf"std must be above 0, got {bad}"):
                function(torch.zeros(3, 4), std=std, backend=quick_backend)


def test_exactly_one_of_the_three() -> None:
    t = torch.ones(3, 4)
    for given in ({"logvar": t, "std": t}, {"std": t, "log_std": t}, {}):
        named = " and ".join(given) or "none of them"
        with pytest.raises(
            ValueError, match=f"exactly one of logvar, std and log_std, got {named}"
        ):
            fastvae.kl_divergence(t, **given)
    with pytest.raises(ValueError, match=r"mu and std must have the same shape, got \[3, 4\]"):
        fastvae.rsample(t, std=t[:2])
    with pytest.raises(TypeError, match="log_std must be a tensor, got float"):
        fastvae.rsample_kl(t, log_std=0.5)  # type: ignore[arg-type]


@routes
def test_the_loss_takes_them(name: str, quick_backend: str) -> None:
    x, logits, mu = torch.rand(5, 8), torch.randn(5, 8), torch.randn(5, 3)
    given = spread(name, (5, 3), torch.float32)
    options = {"backend": quick_backend}
    got = fastvae.elbo_loss(logits, x, mu, **{name: given}, **options)
    want = fastvae.elbo_loss(logits, x, mu, ROUTES[name](given).float(), **options)
    torch.testing.assert_close(got, want)
    got = fastvae.ELBOLoss(backend=quick_backend)(logits, x, mu, **{name: given})
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------- distributions and their priors


def test_a_distribution_where_mu_is(quick_backend: str) -> None:
    mu, logvar = latents((4, 6), torch.float32)
    std = (logvar / 2).exp()
    x, logits = torch.rand(4, 5), torch.randn(4, 5)
    z, kl = fastvae.rsample_kl(mu, logvar, seed=SEED, backend=quick_backend)
    loss = fastvae.elbo_loss(logits, x, mu, logvar, backend=quick_backend)
    for q in (
        DiagonalNormal(mu, logvar),
        DiagonalNormal(mu, std=std),
        DiagonalNormal(mu, log_std=logvar / 2),
        Normal(mu, std),
        Independent(Normal(mu, std), 1),
        SimpleNamespace(mean=mu, logvar=logvar),
    ):
        got = fastvae.rsample_kl(q, seed=SEED, backend=quick_backend)
        torch.testing.assert_close(got, (z, kl))
        torch.testing.assert_close(fastvae.rsample(q, seed=SEED, backend=quick_backend), z)
        torch.testing.assert_close(fastvae.kl_divergence(q, backend=quick_backend), kl)
        torch.testing.assert_close(fastvae.elbo_loss(logits, x, q, backend=quick_backend), loss)
        torch.testing.assert_close(fastvae.diagnose(q, backend=quick_backend).kl, kl.mean())
    with pytest.raises(TypeError, match=r"DiagonalNormal: pass q\.mu and q\.logvar"):
        fastvae.rsample(DiagonalNormal(mu, logvar), logvar)


class LearnedPrior(nn.Module):
    def __init__(self, latents: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.randn(latents))
        self.logvar = nn.Parameter(torch.randn(latents))


def test_a_prior_as_an_object(quick_backend: str) -> None:
    mu, logvar = latents((4, 6), torch.float32)
    learned = LearnedPrior(6)
    pair = (learned.mu, learned.logvar)
    std = (learned.logvar / 2).exp()
    want = fastvae.kl_divergence(mu, logvar, prior=pair, backend=quick_backend)
    want_grads = torch.autograd.grad(want.sum(), pair)
    for prior in (learned, Normal(learned.mu, std), DiagonalNormal(*pair)):
        kl = fastvae.kl_divergence(mu, logvar, prior=prior, backend=quick_backend)
        torch.testing.assert_close(kl, want)
        grads = torch.autograd.grad(kl.sum(), pair, retain_graph=True)
        torch.testing.assert_close(grads, want_grads)


@dtypes
def test_a_prior_of_numbers(dtype: torch.dtype, quick_backend: str) -> None:
    """A tensor without a dimension is a number: it takes the others' dtype."""
    mu, logvar = latents((4, 6), dtype)
    want = fastvae.kl_divergence(mu, logvar, prior=(0.5, -1.0), backend=quick_backend)
    learned = torch.tensor(0.5, requires_grad=True)
    given = [(learned, torch.tensor(-1.0)), (0.5, torch.tensor(-1.0).double())]
    fine = fastvae.kl_divergence(mu.double(), logvar.double(), prior=(0.1, 0.2))
    for prior in ((0.1, 0.2), Normal(0.1, torch.tensor(0.1).exp())):  # nothing 16 bits have
        kl = fastvae.kl_divergence(mu, logvar, prior=prior, backend=quick_backend)
        torch.testing.assert_close(kl, fine.to(kl.dtype), rtol=1e-5, atol=1e-6)
    for prior in (*given, Normal(0.5, torch.tensor(-0.5).exp())):
        kl = fastvae.kl_divergence(mu, logvar, prior=prior, backend=quick_backend)
        assert kl.dtype == compute_dtype(dtype)
        torch.testing.assert_close(kl, want)
    kl = fastvae.kl_divergence(mu, logvar, prior=given[0], backend=quick_backend)
    (slope,) = torch.autograd.grad(kl.sum(), learned)
    exact = ((0.5 - mu.double()) * math.e).sum().float()
    torch.testing.assert_close(slope, exact, rtol=1e-2 if mu.itemsize == 2 else 1e-5, atol=1e-3)


# --------------------------------------------------------------------------- where the KL is summed

SUMS: dict[str, Callable[[Tensor], Tensor]] = {  # of one value an element, [B, T, L]
    "sample": lambda kl: kl.flatten(1).sum(1),
    "step": lambda kl: kl.sum(2),
    "all": lambda kl: kl.sum(),
    "dimension": lambda kl: kl.mean(0),
    "dimension-of-steps": lambda kl: kl.mean((0, 1)),
    "element": lambda kl: kl,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sample": {},
    "step": {"batch_dims": 2},
    "all": {"batch_dims": 0},
    "dimension": {"per": "dimension"},
    "dimension-of-steps": {"per": "dimension", "batch_dims": 2},
    "element": {"per": "element"},
}
sums = pytest.mark.parametrize("where", SUMS)
with_prior = pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])


@sums
@with_prior
@pytest.mark.parametrize("fused", [False, True], ids=["kl_divergence", "rsample_kl"])
def test_where_the_kl_is_summed(where: str, prior: bool, fused: bool, backend: str) -> None:
    inputs = latents((4, 3, 9), torch.float32)
    inputs += [torch.randn(9), torch.randn(3, 9)] if prior else []

    def ours(m: Tensor, lv: Tensor, *p: Tensor) -> Tensor:
        options = {**OPTIONS[where], "prior": p or None, "backend": backend}
        if fused:
            return fastvae.rsample_kl(m, lv, num_samples=2, **options)[1]
        return fastvae.kl_divergence(m, lv, **options)

    upstream = upstream_like(SUMS[where](inputs[0]).shape)
    kl, grads = run(ours, inputs, upstream)
    wide = [t.double() for t in inputs]
    want, want_grads = run(lambda *t: SUMS[where](kl_oracle(*t)), wide, upstream)
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-6)
    for got, exact in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_draws_do_not_depend_on_where_the_kl_is_summed(backend: str) -> None:
    mu, logvar = latents((4, 3, 9), torch.float32)
    stream = {"seed": SEED, "sample_index": torch.tensor([7, 0, 2, 5]), "backend": backend}
    z = fastvae.rsample(mu, logvar, **stream)
    for options in OPTIONS.values():
        assert torch.equal(fastvae.rsample_kl(mu, logvar, **options, **stream)[0], z)


@sums
@with_prior
@pytest.mark.parametrize("fused", [False, True], ids=["kl_divergence", "rsample_kl"])
def test_a_mask_of_the_latents(where: str, prior: bool, fused: bool, backend: str) -> None:
    """What is left out may hold NaN; a mean is over what is left."""
    clean = latents((4, 3, 9), torch.float32)
    clean += [torch.randn(9), torch.randn(3, 9)] if prior else []
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()[..., None]
    inputs = [t.where(mask, torch.nan) for t in clean[:2]] + clean[2:]

    def ours(m: Tensor, lv: Tensor, *p: Tensor) -> Tensor:
        options = {**OPTIONS[where], "prior": p or None, "mask": mask, "backend": backend}
        if not fused:
            return fastvae.kl_divergence(m, lv, **options)
        z, kl = fastvae.rsample_kl(m, lv, **options)
        assert z.isfinite().all()
        return kl

    def oracle(*t: Tensor) -> Tensor:
        kl = kl_oracle(*t) * mask
        kept = mask.expand(kl.shape).double()
        count = SUMS[where](kept) if "dimension" in where else torch.ones(())
        return SUMS[where](kl) / count.clamp(min=1e-300)

    upstream = upstream_like(SUMS[where](clean[0]).shape)
    kl, grads = run(ours, inputs, upstream)
    want, want_grads = run(oracle, [t.double() for t in clean], upstream)
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-6)
    for got, exact in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [math.nan, 0.0, -1.0])
@pytest.mark.parametrize("fused", [False, True], ids=["kl_divergence", "rsample_kl"])
def test_a_masked_std_may_be_anything(padding: float, fused: bool, quick_backend: str) -> None:
    mask = torch.tensor([True, False, True])[:, None]
    mu = torch.randn(3, 5, requires_grad=True)
    std = torch.rand(3, 5).add(0.5).where(mask, padding).requires_grad_()
    options = {"std": std, "mask": mask, "backend": quick_backend}
    kl = fastvae.rsample_kl(mu, **options)[1] if fused else fastvae.kl_divergence(mu, **options)
    assert kl[1] == 0 and kl.isfinite().all()
    for grad in torch.autograd.grad(kl.sum(), [mu, std]):
        assert torch.equal(grad[1], torch.zeros(5)) and grad.isfinite().all()
    x, logits = torch.rand(3, 4), torch.randn(3, 4)
    loss = fastvae.elbo_loss(logits, x, mu, std=std, kl_mask=mask, backend=quick_backend)
    want = fastvae.elbo_loss(logits, x, kl=kl, backend=quick_backend)
    torch.testing.assert_close(loss, want)


def test_a_masked_sample_has_no_gradient(quick_backend: str) -> None:
    mu, logvar = latents((3, 5), torch.float32)
    mask = torch.tensor([True, False, True])[:, None]
    leaves = [t.where(mask, torch.nan).requires_grad_() for t in (mu, logvar)]
    z, kl = fastvae.rsample_kl(*leaves, mask=mask, seed=SEED, backend=quick_backend)
    noise = fastvae.rsample(*torch.zeros(2, 3, 5), seed=SEED, backend=quick_backend)
    assert torch.equal(z[1], noise[1]) and kl[1] == 0
    for grad in torch.autograd.grad(z.sum() + kl.sum(), leaves):
        assert torch.equal(grad[1], torch.zeros(5)) and grad.isfinite().all()


def test_a_padded_sequence_in_one_call(quick_backend: str) -> None:
    """The loss of a batch of two lengths is that of each alone."""
    x, logits = torch.rand(2, 4, 7), torch.randn(2, 4, 7)
    mu, logvar = latents((2, 4, 3), torch.float32)
    lengths = torch.tensor([4, 2])
    kept = torch.arange(4) < lengths[:, None]
    alone = [
        fastvae.elbo_loss(*(t[b : b + 1, :n] for t in (logits, x, mu, logvar)))
        for b, n in enumerate(lengths)
    ]
    padded = [t.where(kept[..., None], torch.nan) for t in (logits, x, mu, logvar)]
    criterion = fastvae.ELBOLoss(reduction="none", backend=quick_backend)
    masks = {"mask": kept[..., None], "kl_mask": kept[..., None]}
    torch.testing.assert_close(criterion(*padded, **masks), torch.stack(alone))
    with pytest.raises(ValueError, match="kl_mask"):
        criterion(*padded[:2], kl=torch.ones(2), **masks)


@pytest.mark.parametrize("padding", [math.nan, 0.0])
def test_a_masked_scale_of_a_distribution_may_be_anything(
    padding: float, quick_backend: str
) -> None:
    mask = torch.tensor([True, False, True])[:, None]
    mu, logvar = latents((3, 5), torch.float32)
    scale = torch.rand(3, 5).add(0.5).where(mask, padding).requires_grad_()
    q = Normal(mu, scale, validate_args=False)
    options = {"mask": mask, "backend": quick_backend}
    for kl in (
        fastvae.kl_divergence(q, **options),
        fastvae.kl_divergence(mu, logvar, prior=q, **options),
    ):
        (grad,) = torch.autograd.grad(kl.sum(), scale)
        assert kl[1] == 0 and torch.equal(grad[1], torch.zeros(5)) and grad.isfinite().all()


def test_bad_sums() -> None:
    mu, logvar = latents((4, 3), torch.float32)
    for dims, error, message in (
        (-1, ValueError, "batch_dims must be at least 0, got -1"),
        (3, ValueError, r"mu must have batch_dims = 3 dimensions, got \[4, 3\]"),
        (1.0, TypeError, "batch_dims must be an int, got float"),
    ):
        for function in (fastvae.kl_divergence, fastvae.rsample_kl):
            with pytest.raises(error, match=message):
                function(mu, logvar, batch_dims=dims)
    for function in (fastvae.kl_divergence, fastvae.rsample_kl):
        with pytest.raises(ValueError, match="per must be one of sample, dimension, element, got"):
            function(mu, logvar, per="batch")
        with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32"):
            function(mu, logvar, mask=mu)
        with pytest.raises(ValueError, match=r"mask must broadcast to mu's shape \[4, 3\], got"):
            function(mu, logvar, mask=torch.ones(4, dtype=torch.bool))


# ----------------------------------------------------------------------------------------- compiled


def test_compiled_as_a_whole() -> None:
    x, logits = torch.rand(4, 5), torch.randn(4, 5)
    mu, std = torch.randn(4, 3, 2), torch.rand(4, 3, 2) + 0.5
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1]]).bool()[..., None]
    criterion = fastvae.ELBOLoss(free_bits=0.2)

    def step(mu: Tensor, std: Tensor) -> Tensor:
        kl = fastvae.kl_divergence(mu, std=std, batch_dims=2, mask=mask, prior=Normal(0.0, 2.0))
        return criterion(logits, x, mu, std=std, kl_mask=mask) + kl.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [mu.requires_grad_(), std.requires_grad_()]
    got, want = compiled(*leaves), step(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, leaves) for v in (got, want)))
