"""Finite wherever float64 says that the answer is a float32: no 0 · ∞, no square that overflows.

Every family and KL over parameters that reach far beyond what float32's exponential holds, value
and gradient of each element against the float64 oracle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import test_counts
import torch
from cases import floating, leaves_of
from torch import Tensor
from torch.distributions import Normal

import fastvae
from fastvae import reference
from fastvae.likelihoods import Gaussian, registry

LOGVAR = [*range(-200, 201, 8), -177.5, -177.4, -89.0, -88.8, -88.7, 88.7, 88.8, 177.4, 177.5]
RESIDUAL = [sign * r for r in (0.0, 1e-20, 1e-10, 1.0, 1e10) for sign in (1, -1)]
LOGIT = [*range(-200, 201, 10)]
TARGET = [0.0, 1e-20, 0.3, 1.0]
PROB = [0.0, 1e-38, 1e-20, 1e-8, 0.5, 1 - 2.0**-24, 1.0]
SCALE = [1e-18, 1e-9, 1.0, 1e9, 1e18]

Formula = Callable[..., Tensor]


def grid(*axes: Sequence[float]) -> list[Tensor]:
    """One float32 vector per axis: their product, element by element."""
    return list(torch.tensor(list(itertools.product(*axes)), dtype=torch.float32).cpu().T)


def gaussian(name: str, backend: str) -> list[tuple[Formula, Formula, list[Tensor]]]:
    residual, logvar = grid(RESIDUAL, LOGVAR)
    zero = torch.zeros_like(residual)
    if name == "gaussian_logvar":
        return [(ours(name, backend), reference.gaussian_logvar, [residual, zero, logvar])]
    (residual,) = grid(RESIDUAL)
    return [
        (
            ours(Gaussian(scale=s), backend),
            lambda x, m, s=s: reference.gaussian(x, m, scale=s),
            [residual, torch.zeros_like(residual)],
        )
        for s in SCALE
    ]


def categorical(name: str, backend: str) -> tuple[Formula, Formula, list[Tensor]]:
    """Three classes, the logits of each as an input of its own."""
    x, *logits = grid([0, 1, 2], [*LOGIT, 1e4, -1e30], LOGIT, [0.0])

    def stacked(function: Formula) -> Formula:
        return lambda x, *logits: function(x, torch.stack(logits, 1))

    return stacked(ours(name, backend)), stacked(reference.categorical), [x.long(), *logits]


def ours(likelihood: Any, backend: str) -> Formula:
    def formula(x: Tensor, *recon: Tensor) -> Tensor:
        return fastvae.log_likelihood(recon, x, likelihood, backend=backend)

    return formula


FAMILIES: dict[str, Callable[[str, str], list[tuple[Formula, Formula, list[Tensor]]]]] = {
    "bernoulli": lambda n, b: [(ours(n, b), reference.bernoulli, grid(TARGET, LOGIT))],
    "bernoulli_probs": lambda n, b: [(ours(n, b), reference.bernoulli_probs, grid(TARGET, PROB))],
    "gaussian": gaussian,
    "gaussian_logvar": gaussian,
    "categorical": lambda n, b: [categorical(n, b)],
}


def check(
    formula: Formula, oracle: Formula, inputs: list[Tensor], what: str, operands: float = 0.0
) -> None:
    """Each element's value and gradients, its error relative to the exact number or, of a sum of
    terms, to the largest of them; `operands`: those of a gradient."""
    with torch.device("cpu"):
        wide = [t.double().requires_grad_() for t in inputs]
        exact = oracle(*wide)
        exact_grads = torch.autograd.grad(exact.sum(), wide)[len(inputs) - len(floating(inputs)) :]
    on = torch.empty(0).device  # the default one
    leaves = leaves_of([t.detach().to(on).clone() for t in inputs])
    value = formula(*leaves)
    grads = torch.autograd.grad(value.sum(), floating(leaves))
    for i, (got, want) in enumerate(zip((value, *grads), (exact, *exact_grads), strict=True)):
        label = f"{what}: {'value' if i == 0 else f'gradient {i - 1}'}"
        got, want = got.detach().cpu(), want.detach()
        expected = want.float()
        # The value adds terms of the inputs' size; a log-variance's gradient is one less ½.
        scale = want.abs() + (1 + sum(t.detach().abs() for t in wide) if i == 0 else 0.5 * (i > 1))
        scale = scale + operands * (i > 0)
        finite = expected.isfinite()
        error = (got.double() - want).abs()
        bound = 16 * 2.0**-23 * scale + 4 * 2.0**-126
        bad = torch.where(finite, ~(error <= bound), got != expected)
        # Next to float32's largest number a rounding decides between it and infinity.
        bad &= ~((want.abs() > 3.4e38) & (want.abs() < 3.41e38))
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise AssertionError(
                f"{label}: at {[t[at].item() for t in inputs]} got {float(got[at]):.9g}, float64 "
                f"says {float(want[at]):.9g}; {int(bad.sum())} of {len(bad)} are wrong"
            )


def test_no_family_is_left_out() -> None:
    assert {*FAMILIES, *test_counts.CASES} == set(registry)  # those have a sharper bound there


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, backend: str) -> None:
    # torch's log_softmax, which eager is, has gradients of 1 - p.
    operands = 1.0 if (name, backend) == ("categorical", "eager") else 0.0
    for formula, oracle, inputs in FAMILIES[name](name, backend):
        check(formula, oracle, inputs, name, operands)


def test_kl_to_the_standard_normal(backend: str) -> None:
    inputs = grid(RESIDUAL, LOGVAR)
    check(
        lambda m, lv: fastvae.kl_divergence(m, lv, backend=backend),
        reference.kl_elementwise,
        inputs,
        "kl",
    )


@pytest.mark.parametrize("near", [False, True])
def test_kl_to_a_prior(near: bool, backend: str) -> None:
    """near: the posterior has the prior's variance."""
    if near:
        residual, logvar = grid(RESIDUAL, LOGVAR)
        prior_logvar = logvar
    else:
        residual, logvar, prior_logvar = grid(RESIDUAL, [-200.0, -88.8, 0.0, 88.8, 200.0], LOGVAR)
    check(
        lambda m, lv, pm, plv: fastvae.kl_divergence(m, lv, prior=(pm, plv), backend=backend),
        lambda m, lv, pm, plv: reference.kl_elementwise(m, lv, (pm, plv)),
        [residual, logvar, torch.zeros_like(residual), prior_logvar],
        "kl",
    )


def test_sampling(backend: str) -> None:
    """mu + e^(logvar / 2) eps, where that is a number: with eps known, and 0 times it is 0."""
    logvar = torch.tensor([-400.0, -180.0, 0.0, 177.6, 180.0, 200.0]).repeat_interleave(64)[None]
    logvar = logvar.requires_grad_()
    z = fastvae.rsample(torch.zeros_like(logvar), logvar, seed=3, backend=backend)
    unit = fastvae.rsample(
        torch.zeros_like(logvar), torch.zeros_like(logvar), seed=3, backend=backend
    )
    exact = (0.5 * logvar.detach().double()).exp() * unit.double()
    fits = exact.float().isfinite()
    assert fits.sum() > 200 and not fits.all()
    error = (z.detach().double() - exact).abs()
    assert (error <= 2e-6 * exact.abs() + 2e-38)[fits].all()
    assert torch.equal(z[~fits], exact[~fits].float())


@pytest.mark.parametrize("logvar", [-2000.0, -1500.0, -1420.0, -800.0, 800.0, 1420.0, 2000.0])
def test_float64_has_wider_limits(logvar: float, backend: str) -> None:
    """Exactly scaled residuals, whose square is a number though neither factor is."""
    lv = torch.full((3,), logvar, dtype=torch.float64)
    x = torch.tensor([0.0, 1e-200, 1e-300], dtype=torch.float64) * (1e150 if logvar > 0 else 1.0)
    value = fastvae.log_likelihood(
        (torch.zeros_like(lv), lv), x, "gaussian_logvar", backend=backend
    )
    u = x.cpu().log() - 0.5 * lv.cpu()  # of the scaled residual, the logarithm
    square = torch.where(x.cpu() == 0, 0.0, (2 * u).exp())
    want = -0.5 * (lv.cpu() + square) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(value.cpu(), want, rtol=1e-11, atol=0)
    z = fastvae.rsample(torch.zeros_like(lv), lv, seed=1, backend=backend)
    assert z.isinf().all() if logvar > 1500 else (z == 0).all() or logvar > -1500


def test_log_prob_of_the_distribution() -> None:
    residual, logvar = grid(RESIDUAL, LOGVAR)
    check(
        lambda z, m, lv: fastvae.DiagonalNormal(m, lv).log_prob(z),
        lambda z, m, lv: Normal(m, (lv / 2).exp(), validate_args=False).log_prob(z),
        [residual, torch.zeros_like(residual), logvar],
        "log_prob",
    )


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "double"])
def test_transforms(transform: str) -> None:
    """The composites behind torch.func and double backward."""
    residual, logvar = grid(RESIDUAL, LOGVAR)

    def value(m: Tensor, lv: Tensor) -> Tensor:
        ll = fastvae.log_likelihood((m, lv), torch.zeros_like(m), "gaussian_logvar")
        return ll - fastvae.kl_divergence(m, torch.zeros_like(m), prior=(torch.zeros_like(m), lv))

    exact = gradients(
        lambda m, lv: (
            reference.gaussian_logvar(torch.zeros_like(m), m, lv)
            - reference.kl_elementwise(m, torch.zeros_like(m), (torch.zeros_like(m), lv))
        ),
        residual.double(),
        logvar.double(),
    )
    ones = torch.ones_like(residual)
    if transform == "grad":
        got = torch.func.grad(lambda m, lv: value(m, lv).sum(), argnums=(0, 1))(residual, logvar)
    elif transform == "vmap":
        got = torch.vmap(torch.func.grad(lambda m, lv: value(m[None], lv[None]).sum(), (0, 1)))(
            residual, logvar
        )
    elif transform == "jvp":
        tangents = [(ones, 0 * ones), (0 * ones, ones)]
        got = tuple(torch.func.jvp(value, (residual, logvar), t)[1] for t in tangents)
    else:
        leaves = residual.clone().requires_grad_(), logvar.clone().requires_grad_()
        got = torch.autograd.grad(value(*leaves).sum(), leaves, create_graph=True)
        got = tuple(g.detach() for g in got)
    for i, (g, want) in enumerate(zip(got, exact, strict=True)):
        fits = want.abs() < 3e37  # room for the product of a factor and a tangent
        if transform == "jvp":  # the tangent of the scaled residual is 1/σ itself
            fits &= logvar > -170
        size = want.abs() + 1
        assert g[fits].isfinite().all(), (transform, i)
        assert ((g.double() - want).abs() <= 32 * 2.0**-23 * size)[fits].all(), (transform, i)


def gradients(formula: Formula, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(formula(*leaves).sum(), leaves)
