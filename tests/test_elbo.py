"""ELBOLoss and elbo_loss: every reduction and argument, and parity with the usual conventions."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    FAMILIES,
    Family,
    assert_within,
    compute_dtype,
    floating,
    leaves_of,
    run,
    upstream_like,
)
from torch import Tensor

import fastvae
from fastvae import ELBOLoss, reference
from fastvae.likelihoods import Gaussian

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def recon_of(params: tuple[Tensor, ...]) -> Any:
    return params[0] if len(params) == 1 else params


def assert_near(ours: Tensor, oracle: Tensor, scale: Tensor | float, what: str) -> None:
    """Within 8 roundings of scale, the size of what was added up."""
    bound = 8 * torch.finfo(ours.dtype).eps * torch.as_tensor(scale).double()
    assert_within(ours, oracle, bound.expand(oracle.shape), what=what)


def check_elbo(
    family: Family,
    dtype: torch.dtype,
    backend: str,
    *,
    reduction: str = "mean",
    beta: float = 1.0,
    num_samples: int | None = None,
    weighted: bool = False,
    masked: bool = False,
    with_prior: bool = False,
    given_kl: bool = False,
    shape: tuple[int, ...] = (6, 3, 17),
) -> None:
    """Loss, the gradient of every input and the terms, against the oracle."""
    x, *params = family.inputs(shape, dtype, num_samples)
    batch = shape[0]
    mu, logvar = torch.randn(batch, 5).to(dtype), torch.randn(batch, 5).to(dtype)
    prior = (torch.randn(5).to(dtype), torch.randn(1, 5).to(dtype)) if with_prior else ()
    compute = compute_dtype(dtype)
    latent = [torch.rand(batch, dtype=compute)] if given_kl else [mu, logvar, *prior]
    shared: dict[str, Any] = {
        "sample_weight": torch.rand(batch) if weighted else None,
        "mask": torch.rand(shape) < 0.7 if masked else None,
    }
    criterion = ELBOLoss(family.make(), beta=beta, reduction=reduction, backend=backend)
    count = len(params)

    def arguments(leaves: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        recon, rest = recon_of(leaves[1 : 1 + count]), leaves[1 + count :]
        if given_kl:
            return (recon, leaves[0]), {"kl": rest[0], **shared}
        return (recon, leaves[0], *rest[:2]), {"prior": rest[2:] or None, **shared}

    def ours(*leaves: Tensor) -> Tensor:
        positional, named = arguments(leaves)
        loss: Tensor = criterion(*positional, **named)
        return loss

    def oracle(*leaves: Tensor) -> Tensor:
        positional, named = arguments(leaves)
        options = {"likelihood_name": family.name, **family.options}
        return reference.elbo_loss(*positional, beta=beta, reduction=reduction, **options, **named)

    inputs = [x, *params, *latent]
    wide = [t.double() for t in inputs]
    upstream = upstream_like((batch,)) if reduction == "none" else torch.tensor(1.3)
    value, grads = run(ours, inputs, upstream)
    expected, expected_grads = run(oracle, wide, upstream)
    assert value.dtype == compute and value.shape == expected.shape
    terms, *sizes = family.magnitudes(*family.together(wide[: 1 + count]))
    assert_near(value, expected, terms.sum() + 50.0, "loss")
    whole = len(inputs) - len(grads)  # x, where it holds counts
    for i, (grad, exact) in enumerate(zip(grads, expected_grads[whole:], strict=True), whole):
        assert grad.dtype == inputs[i].dtype
        size = sizes[i].max() if i < len(sizes) else exact.abs().max() + 1.0
        assert_near(grad, exact, 2 * size * max(1, num_samples or 1), f"gradient {i}")

    positional, named = arguments(tuple(leaves_of(inputs)))
    functional = fastvae.elbo_loss(
        *positional,
        likelihood=family.make(),
        beta=beta,
        reduction=reduction,
        backend=backend,
        **named,
    )
    assert torch.equal(functional.detach(), value)
    parts = criterion.terms(*positional, **named)
    assert parts._fields == ("loss", "log_likelihood", "kl")
    assert torch.equal(parts.loss.detach(), value) and parts.loss.requires_grad
    assert not parts.log_likelihood.requires_grad and not parts.kl.requires_grad
    assert parts.log_likelihood.shape == parts.kl.shape == value.shape
    positional, named = arguments(tuple(wide))
    no_kl = {**named, "kl": torch.zeros(batch)}
    no_kl.pop("prior", None)
    options = {"likelihood_name": family.name, **family.options}
    exact_ll = -reference.elbo_loss(*positional[:2], reduction=reduction, **options, **no_kl)
    assert_near(parts.log_likelihood, exact_ll, terms.sum(), "log_likelihood")
    assert_near(beta * parts.kl - parts.log_likelihood, expected, terms.sum() + 50.0, "terms")


@families
@dtypes
@reductions
def test_every_reduction(family: Family, dtype: torch.dtype, reduction: str, backend: str) -> None:
    check_elbo(family, dtype, backend, reduction=reduction)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian_logvar"])
@reductions
@pytest.mark.parametrize("given_kl", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("weighted", "masked", "num_samples", "beta"), values, strict=True))
        for values in itertools.product([False, True], [False, True], [None, 4], [1.0, 0.25])
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items() if v),
)
def test_every_argument(
    name: str, reduction: str, given_kl: bool, options: dict[str, Any], backend: str
) -> None:
    check_elbo(
        FAMILIES[name],
        torch.float32,
        backend,
        reduction=reduction,
        given_kl=given_kl,
        with_prior=not given_kl,
        **options,
    )


@families
@dtypes
def test_everything_at_once(family: Family, dtype: torch.dtype, backend: str) -> None:
    check_elbo(
        family, dtype, backend, beta=4.0, num_samples=3, weighted=True, masked=True, with_prior=True
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_beta(beta: float, backend: str) -> None:
    check_elbo(FAMILIES["bernoulli"], torch.float64, backend, beta=beta)


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 784), (257, 3), (2, 3, 1, 5, 2, 3)], ids=str)
def test_shapes(shape: tuple[int, ...], backend: str) -> None:
    check_elbo(FAMILIES["bernoulli"], torch.float32, backend, shape=shape)


def test_weighted_mean_is_the_plain_mean_of_the_weighted_losses(backend: str) -> None:
    x, logits = FAMILIES["bernoulli"].inputs((4, 9), torch.float64)
    mu, logvar = torch.randn(2, 4, 3, dtype=torch.float64)
    weight = torch.tensor([0.0, 1.0, 2.0, 5.0])
    per_sample, mean = (
        fastvae.elbo_loss(
            logits, x, mu, logvar, sample_weight=weight, reduction=reduction, backend=backend
        )
        for reduction in ("none", "mean")
    )
    plain = fastvae.elbo_loss(logits, x, mu, logvar, reduction="none", backend=backend)
    torch.testing.assert_close(per_sample, plain * weight.double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(mean, per_sample.sum() / 4, rtol=1e-14, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_large_batch(weighted: bool, backend: str) -> None:
    """Devices sum it in stages."""
    logits, x, kl = torch.randn(5001, 2), torch.rand(5001, 2), torch.rand(5001)
    weight = torch.rand(5001) if weighted else None
    terms = fastvae.elbo_terms(
        logits, x, kl=kl, sample_weight=weight, beta=0.5, reduction="sum", backend=backend
    )
    rows = fastvae.log_likelihood(logits, x, backend="eager").double()
    w = 1 if weight is None else weight.double()
    parts = (w * rows).sum(), (w * kl.double()).sum()
    for got, want in zip(terms, (0.5 * parts[1] - parts[0], *parts), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@families
@dtypes
@reductions
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("given_kl", [False, True])
def test_empty_batch(
    family: Family,
    dtype: torch.dtype,
    reduction: str,
    num_samples: int | None,
    given_kl: bool,
    backend: str,
) -> None:
    x, *params = leaves_of(family.inputs((0, 7), dtype, num_samples))
    latent = [torch.empty(0, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
    criterion = ELBOLoss(family.make(), reduction=reduction, backend=backend)
    recon = recon_of(tuple(params))
    if given_kl:
        latent = [torch.empty(0, requires_grad=True)]
        loss, ll, kl = criterion.terms(recon, x, kl=latent[0])
    else:
        loss, ll, kl = criterion.terms(recon, x, *latent)
    expected = torch.zeros(0 if reduction == "none" else (), dtype=loss.dtype)
    for part in (loss, ll, kl):
        assert torch.equal(part.detach(), expected)
    loss.sum().backward()
    for leaf in floating([x, *params, *latent]):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape


# -------------------------------------------------------------------- Gaussian with a log-variance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("logvar_shape", ["learned", (3, 17), (17,), (3, 1), (), (1, 1)], ids=str)
def test_gaussian_with_shared_logvar(
    dtype: torch.dtype, num_samples: int | None, logvar_shape: Any, backend: str
) -> None:
    shape = (4, 3, 17)
    x, mean, _ = FAMILIES["gaussian_logvar"].inputs(shape, dtype, num_samples)
    kl = torch.rand(4, dtype=dtype)
    if logvar_shape == "learned":
        likelihood = Gaussian(logvar="learned").to(dtype)
        scale = likelihood.logvar
        assert isinstance(scale, torch.nn.Parameter) and scale.shape == (1,) and scale == 0
        with torch.no_grad():
            scale.fill_(0.7)
    else:
        scale = torch.randn(logvar_shape, dtype=dtype, requires_grad=True)
        likelihood = Gaussian(logvar=scale)
    for reduction in ("none", "sum", "mean"):
        criterion = ELBOLoss(likelihood, reduction=reduction, backend=backend)
        leaves = [t.requires_grad_() for t in (mean, x, kl)]
        loss = criterion(mean, x, kl=kl)
        upstream = upstream_like(loss.shape)
        grads = torch.autograd.grad(loss, [*leaves, scale], upstream)
        wide = [t.detach().double() for t in (*leaves, scale)]
        expected, expected_grads = run(
            lambda m, t, d, lv, reduction=reduction: reference.elbo_loss(
                (m, lv), t, kl=d, likelihood_name="gaussian_logvar", reduction=reduction
            ),
            wide,
            upstream,
        )
        size = float(wide[3].neg().exp().max()) * 100 * (num_samples or 1) + 10
        assert_near(loss.detach(), expected, 51 * size, "loss")
        for i, (grad, exact) in enumerate(zip(grads, expected_grads, strict=True)):
            assert grad.shape == exact.shape
            assert_near(grad, exact, size * (51 if i == 3 else 1), f"gradient {i}")


def test_learned_logvar_is_part_of_the_state() -> None:
    criterion = ELBOLoss(Gaussian(logvar="learned"))
    state = criterion.state_dict()
    assert list(state) == ["likelihood.logvar"]
    assert [p.shape for p in criterion.parameters()] == [(1,)]
    state["likelihood.logvar"] = torch.tensor([-1.5])
    criterion.load_state_dict(state)
    x, mean = torch.randn(2, 3, 5)
    torch.testing.assert_close(
        criterion(mean, x, kl=torch.zeros(3)),
        ELBOLoss(Gaussian(scale=math.exp(-0.75)))(mean, x, kl=torch.zeros(3)),
    )


def test_reset_parameters_after_the_meta_device() -> None:
    with torch.device("meta"):
        criterion = ELBOLoss(Gaussian(logvar="learned"))
    criterion.to_empty(device="cpu")
    with torch.no_grad():
        criterion.likelihood.logvar.fill_(math.nan)
    for module in criterion.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(criterion.likelihood.logvar, torch.zeros(1))
    given = Gaussian(logvar=torch.nn.Parameter(torch.ones(3)))
    given.reset_parameters()  # what was given is not ours to know
    assert given.logvar.tolist() == [1, 1, 1]


def test_a_scale_that_opacus_tracks_is_refused() -> None:
    """Its hooks see calls of modules, and would leave the gradient out without a word."""
    criterion = ELBOLoss(Gaussian(logvar="learned"))
    criterion.likelihood.logvar.grad_sample = None  # as GradSampleModule does
    with pytest.raises(TypeError, match=r"Opacus.*leave the criterion out"):
        criterion(torch.zeros(2, 3), torch.zeros(2, 3), kl=torch.zeros(2))


def test_terms_are_a_call() -> None:
    """Hooks see it, and compile() in place serves it."""
    criterion, calls = ELBOLoss(), []
    criterion.register_forward_hook(lambda module, args, output: calls.append(output))
    x, kl = torch.rand(3, 4), torch.rand(3)
    terms = criterion.terms(torch.zeros(3, 4), x, kl=kl)
    assert calls == [terms] and isinstance(terms, fastvae.Terms)
    assert torch.equal(criterion(torch.zeros(3, 4), x, kl=kl), terms.loss)
    torch._dynamo.reset()
    compiled = torch.compile(ELBOLoss(), fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(torch.zeros(3, 4), x, kl=kl, return_terms=True), terms, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_prior_of_numbers(backend: str) -> None:
    x, recon, mu, logvar = torch.rand(4, 4, 9)
    numbers = fastvae.elbo_loss(recon, x, mu, logvar, prior=(0.5, -1), backend=backend)
    prior = torch.full((9,), 0.5), torch.full((9,), -1.0)
    assert torch.equal(
        numbers, fastvae.elbo_loss(recon, x, mu, logvar, prior=prior, backend=backend)
    )
    standard = fastvae.kl_divergence(mu, logvar, prior=(0.0, 0.0), backend=backend)
    torch.testing.assert_close(standard, fastvae.kl_divergence(mu, logvar, backend=backend))


def test_learned_logvar_finds_the_variance(backend: str) -> None:
    """Its gradient vanishes where exp(logvar) is the mean squared error."""
    likelihood = Gaussian(logvar="learned").double()
    x, mean = torch.randn(2, 50, 7, dtype=torch.float64)
    with torch.no_grad():
        likelihood.logvar.fill_(((x - mean) ** 2).mean().log())
    loss = ELBOLoss(likelihood, backend=backend)(mean, x, kl=torch.zeros(50, dtype=torch.float64))
    (grad,) = torch.autograd.grad(loss, [likelihood.logvar])
    assert grad.abs() < 1e-14 * 7 * 50


@pytest.mark.parametrize(
    "likelihood",
    [
        *["bernoulli", "bernoulli_probs", "gaussian", "gaussian_logvar"],
        Gaussian(scale=0.3, normalized=False),
        Gaussian(logvar=torch.zeros(9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_behave_the_same(likelihood: Any, how: Any) -> None:
    criterion = ELBOLoss(likelihood, beta=0.5, reduction="sum")
    twin = how(criterion)
    assert (twin.beta, twin.reduction, twin.backend) == (0.5, "sum", "auto")
    x, mu, logvar = torch.rand(3, 4, 9)
    recon: Any = torch.rand(4, 9)
    if likelihood == "gaussian_logvar":
        recon = (recon, torch.randn(4, 9))
    assert torch.equal(twin(recon, x, mu, logvar), criterion(recon, x, mu, logvar))


def test_a_copy_of_the_learned_scale_is_its_own() -> None:
    criterion = ELBOLoss(Gaussian(logvar="learned"))
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert isinstance(twin.likelihood.logvar, torch.nn.Parameter)
        assert twin.likelihood.logvar is not criterion.likelihood.logvar


def test_names_and_objects_are_the_same_likelihood(backend: str) -> None:
    x, recon, mu, logvar = torch.rand(4, 4, 9)
    for name in ("bernoulli", "bernoulli_probs", "gaussian", "gaussian_logvar"):
        given = (recon, mu) if name == "gaussian_logvar" else recon
        by_name = ELBOLoss(name, backend=backend)(given, x, mu, logvar)
        by_object = ELBOLoss(fastvae.likelihoods.get(name), backend=backend)(given, x, mu, logvar)
        assert torch.equal(by_name, by_object)
        assert name in fastvae.likelihoods.registry
