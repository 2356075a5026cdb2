"""Count likelihoods beyond what every family is tested for: accuracy over the whole range against
mpmath, shared and learned dispersions, size factors, other conventions, bad input."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import fastvae
from fastvae.likelihoods import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

COUNT = [0, 1, 2, 5, 16, 17, 100, 10_000, 1_000_000]
MEAN = [1e-8, 1e-3, 0.7, 3.0, 16.5, 1000.0, 1e6]
DISPERSION = [1e-4, 0.03, 1.0, 7.9, 8.1, 300.0, 1e5, 1e8]
ZERO = [-60.0, 0.5, 60.0]
EPS = 2.0**-23


def exact_nb(x: Any, m: Any, theta: Any) -> tuple[list[Any], list[Any]]:
    """ln NB and its derivatives by m and θ, and the largest term of each as it is usually written,
    of the rising factorial the whole."""
    total = m + theta
    rise = mpmath.loggamma(x + theta) - mpmath.loggamma(theta)
    slope = mpmath.digamma(x + theta) - mpmath.digamma(theta)
    share = mpmath.log(theta / total)
    values = [
        rise - mpmath.loggamma(x + 1) + theta * share + x * mpmath.log(m / total),
        x / m - (x + theta) / total,
        slope + share + (m - x) / total,
    ]
    terms = [
        [rise, mpmath.loggamma(x + 1), theta * share, x * mpmath.log(m / total)],
        [x / m, (x + theta) / total],
        [slope, share, m / total, x / total],
    ]
    return values, [max(abs(t) for t in group) for group in terms]


def exact_zinb(x: Any, m: Any, theta: Any, z: Any) -> tuple[list[Any], list[Any]]:
    (nb, by_m, by_theta), (size, size_m, size_theta) = exact_nb(x, m, theta)
    norm = mpmath.log(1 + mpmath.exp(z))
    inflated = mpmath.exp(z - norm)
    if x > 0:
        value, own, elsewhere = nb - norm, 1, 0
    else:
        both = mpmath.log(mpmath.exp(z) + mpmath.exp(nb))
        value, own = both - norm, mpmath.exp(nb - both)
        elsewhere = 1 - own
    values = [value, own * by_m, own * by_theta, elsewhere - inflated]
    own *= max(
        1, abs(nb - norm), abs(z - nb)
    )  # e^(nb − both): a rounding of the exponent counts by its size
    return values, [max(size, norm, abs(z)), own * size_m, own * size_theta, 1]


def exact_poisson(x: Any, m: Any) -> tuple[list[Any], list[Any]]:
    terms = [x * mpmath.log(m), m, mpmath.loggamma(x + 1)]
    return [terms[0] - terms[1] - terms[2], x / m - 1], [max(abs(t) for t in terms), max(x / m, 1)]


def exact_poisson_log(x: Any, log_mean: Any) -> tuple[list[Any], list[Any]]:
    m = mpmath.exp(log_mean)
    terms = [x * log_mean, m, mpmath.loggamma(x + 1)]
    return [terms[0] - terms[1] - terms[2], x - m], [max(abs(t) for t in terms), max(x, m)]


CASES = {
    "poisson": (exact_poisson, [COUNT, MEAN]),
    "poisson_log": (exact_poisson_log, [COUNT, [-18.0, -1.0, 0.3, 2.8, 13.8]]),
    "negative_binomial": (exact_nb, [COUNT, MEAN, DISPERSION]),
    "zero_inflated_negative_binomial": (exact_zinb, [COUNT, MEAN, DISPERSION, ZERO]),
}


@functools.cache
def exactly(name: str) -> tuple[list[Any], Tensor, Tensor]:
    """The grid, and of its float32 numbers the exact value and gradients, and their sizes."""
    exact, axes = CASES[name]
    grid = list(itertools.product(*axes))
    with mpmath.workdps(40), torch.device("cpu"):
        rows = torch.tensor(grid, dtype=torch.float64).float().tolist()
        both = [exact(*map(mpmath.mpf, row)) for row in rows]
        want, size = (
            torch.tensor([[float(v) for v in pair[i]] for pair in both], dtype=torch.float64)
            for i in (0, 1)
        )
    return grid, want, size


@pytest.mark.parametrize("name", CASES)
def test_within_four_roundings_of_the_largest_term(name: str, backend: str) -> None:
    grid, want, size = exactly(name)
    x, *params = torch.tensor(grid, dtype=torch.float64).float().T
    leaves = [p.clone().requires_grad_() for p in params]
    value = fastvae.log_likelihood(tuple(leaves), x, name, backend=backend)
    got = torch.stack([value.detach(), *torch.autograd.grad(value.sum(), leaves)], 1).cpu().double()
    # Of a result: next to it, or where its terms nearly cancel to the largest of these.
    error = (got - want).abs() / (EPS * torch.maximum(size, want.abs()) + 1e-37)
    worst = error.max(0)
    for column, at in enumerate(worst.indices):
        assert error[at, column] <= 4, (
            f"{'value' if column == 0 else f'gradient {column}'} at {grid[at]}: "
            f"got {got[at, column]:.9g}, exactly {want[at, column]:.9g}"
        )


def problem(batch: int = 40, genes: int = 300) -> tuple[Tensor, list[Tensor]]:
    x, recon = ZeroInflatedNegativeBinomial().sample_inputs((batch, genes))
    return x, list(recon)


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("genes", [7, 300, 2500])
@pytest.mark.parametrize("upstream", ["one", "many"])
def test_a_dispersion_per_gene(genes: int, upstream: str, backend: str) -> None:
    """Its gradient is that of the expanded dispersion, summed."""
    x, (mean, theta, z) = problem(70, genes)
    theta = theta[0].clone()
    weight = torch.ones(70) if upstream == "one" else torch.linspace(0.5, 2, 70)

    def run(expand: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (mean, theta, z)]
        recon = (leaves[0], leaves[1].expand(70, genes).clone() if expand else leaves[1], leaves[2])
        name = "zero_inflated_negative_binomial"
        rows = fastvae.log_likelihood(recon, x, name, backend=backend)
        return gradients((rows * weight).sum() if upstream == "many" else rows.sum(), leaves)

    for got, want in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5 * float(want.abs().max()))


def test_shared_gradients_do_not_depend_on_the_threads(
    one_and_two_threads: list[int], native: None
) -> None:
    x, (mean, theta, z) = problem(300, 2100)
    leaves = [t.clone().requires_grad_() for t in (mean, theta[0], z)]
    results = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        rows = fastvae.log_likelihood(tuple(leaves), x, "zero_inflated_negative_binomial")
        results.append(gradients(rows.sum(), leaves))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_gaussian_variance_per_column_is_summed_likewise(backend: str) -> None:
    x, mean, logvar = torch.randn(50, 70), torch.randn(50, 70), torch.randn(70)
    likelihood = fastvae.likelihoods.Gaussian(logvar="per_element")

    def run(expand: bool) -> list[Tensor]:
        leaves = [mean.clone().requires_grad_(), logvar.clone().requires_grad_()]
        second = leaves[1].expand(50, 70).clone() if expand else leaves[1]
        rows = fastvae.log_likelihood((leaves[0], second), x, likelihood, backend=backend)
        return gradients(rows.sum(), leaves)

    for got, want in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_samples", [None, 3])
def test_a_size_factor_is_a_product(num_samples: int | None, backend: str) -> None:
    x, (mean, theta, z) = problem()
    if num_samples:
        mean, theta, z = (t.expand(num_samples, *t.shape).clone() for t in (mean, theta, z))
    size = torch.linspace(0.5, 3, 40)
    for make, params in (
        (NegativeBinomial, [mean, theta]),
        (ZeroInflatedNegativeBinomial, [mean, theta, z]),
        (Poisson, [mean]),
    ):

        def run(fused: bool, make: Any = make, params: list[Tensor] = params) -> list[Tensor]:
            leaves = [t.clone().requires_grad_() for t in (*params, size)]
            *recon, s = leaves
            given = (*recon, s) if fused else (recon[0] * s[:, None], *recon[1:])
            rows = fastvae.log_likelihood(given, x, make(size_factor=fused), backend=backend)
            return gradients(rows.sum(), leaves)

        for got, want in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


def test_a_learned_dispersion(backend: str) -> None:
    x, (mean, _, z) = problem()
    for make, recon in (
        (NegativeBinomial, (mean,)),
        (ZeroInflatedNegativeBinomial, (mean, z)),
    ):
        likelihood: Any = make(log_dispersion=300)
        with torch.no_grad():
            likelihood.log_dispersion.copy_(torch.linspace(-1, 2, 300))
        theta = likelihood.log_dispersion.detach().exp().requires_grad_()
        fastvae.log_likelihood(recon, x, likelihood, backend=backend).sum().backward()
        by_hand = (recon[0], theta, *recon[1:])
        fastvae.log_likelihood(by_hand, x, make(), backend=backend).sum().backward()
        assert theta.grad is not None
        torch.testing.assert_close(
            likelihood.log_dispersion.grad, theta.grad * theta.detach(), rtol=1e-5, atol=1e-5
        )


def test_torchs_convention(backend: str) -> None:
    x, (_, total_count, logits) = problem()
    total_count, logits = total_count.requires_grad_(), logits.requires_grad_()
    leaves = [total_count, logits]
    rows = fastvae.log_likelihood(
        (total_count, logits), x, NegativeBinomial(logits=True), backend=backend
    )
    theirs = torch.distributions.NegativeBinomial(total_count, logits=logits).log_prob(x).sum(1)
    for got, want in zip(
        gradients(rows.sum(), leaves), gradients(theirs.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_float_counts_get_no_gradient(backend: str) -> None:
    x, (mean, theta, _) = problem()
    x, mean = x.requires_grad_(), mean.requires_grad_()
    fastvae.log_likelihood((mean, theta), x, "negative_binomial", backend=backend).sum().backward()
    assert x.grad is None or not x.grad.any()
    assert mean.grad is not None


@pytest.mark.parametrize("name", ["poisson", "negative_binomial"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 1.5}, r"x must hold counts .* got 1.5: of normalized"),
        ({"x": -1.0}, r"x must hold counts .* got values in \[-1"),
        ({"x": float("nan")}, "x must hold counts .* got NaN"),
        ({"mean": -0.1}, "mean must be at least 0"),
        ({"dispersion": 0.0}, "dispersion must be above 0"),
    ],
    ids=str,
)
def test_outside_the_domain(
    name: str, change: dict[str, float], message: str, quick_backend: str
) -> None:
    if quick_backend == "triton" or ("dispersion" in change and name == "poisson"):
        pytest.skip("no check on a device; no such parameter")
    x, (mean, theta, _) = problem(5, 70)
    tensors = {"x": x, "mean": mean, "dispersion": theta}
    for which, value in change.items():
        tensors[which][3, 66] = value
    recon = (mean,) if name == "poisson" else (mean, theta)
    with pytest.raises(ValueError, match=message):
        fastvae.log_likelihood(recon, x, name, backend=quick_backend)
    mask = torch.ones(5, 70, dtype=torch.bool)
    mask[3, 66] = False
    assert fastvae.log_likelihood(recon, x, name, mask=mask, backend=quick_backend).isfinite().all()


def test_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="log_rate"):
        Poisson(log_rate=True, size_factor=True)
    with pytest.raises(ValueError, match="logits stands for both"):
        NegativeBinomial(logits=True, log_dispersion=3)
    with pytest.raises(ValueError, match="eps must be finite"):
        NegativeBinomial(eps=-1)
    with pytest.raises(TypeError, match="log_dispersion must be a tensor or a number of features"):
        NegativeBinomial(log_dispersion="learned")  # type: ignore[arg-type]
    x, (mean, theta, _) = problem()
    with pytest.raises(ValueError, match=r"size_factor must have shape \[40\]"):
        fastvae.log_likelihood((mean, theta, torch.ones(3)), x, NegativeBinomial(size_factor=True))


def test_no_memory_beyond_one_gradient_each(native: None) -> None:
    """A dispersion per gene takes memory of the genes' size, not of the batch's."""
    from benchmarks.cases import Problem
    from benchmarks.runner import peak_memory

    x, (mean, theta, z) = problem(64, 8192)
    inputs = {"x": x, "mean": mean, "theta": theta[0].clone(), "z": z}
    inputs |= {name: t.requires_grad_() for name, t in inputs.items() if name != "x"}

    def step(x: Tensor, mean: Tensor, theta: Tensor, z: Tensor) -> tuple[Tensor]:
        kl = torch.zeros(64)
        name = "zero_inflated_negative_binomial"
        return (fastvae.elbo_loss((mean, theta, z), x, kl=kl, likelihood=name),)

    peak = peak_memory(step, Problem(inputs, (None,), 0, 0))
    assert 2 * mean.nbytes <= peak < 2 * mean.nbytes + 16 * theta[0].nbytes
