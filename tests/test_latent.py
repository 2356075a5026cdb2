"""rsample and rsample_kl: values, gradients, dtypes, layouts, reproducibility."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUT_SHAPE,
    LAYOUTS,
    SHAPES,
    assert_as_good_as_torch,
    assert_within,
    compute_dtype,
    lay_out,
    noise_bound,
    run,
    upstream_like,
)
from torch import Tensor

import fastvae
from fastvae import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
samplers = pytest.mark.parametrize("fused", [False, True], ids=["rsample", "rsample_kl"])

SEED = 77


def sample(fused: bool, mu: Tensor, logvar: Tensor, **options: Any) -> Tensor:
    """z by either function, under SEED unless a generator is given."""
    if "generator" not in options:
        torch.manual_seed(SEED)
    if fused:
        z: Tensor = fastvae.rsample_kl(mu, logvar, **options)[0]
        return z
    return fastvae.rsample(mu, logvar, **options)


def draws(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype = torch.float64, **options: Any
) -> Tensor:
    """The eps that this backend draws under SEED, exactly: z of mu = logvar = 0."""
    zeros = torch.zeros(shape, dtype=dtype)
    return sample(False, zeros, zeros, backend=backend, **options).double()


def latents(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [(2 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)]


def scale_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes of the operands of kl, its gradient in mu and its gradient in logvar."""
    return ((mu**2 + logvar.abs() + logvar.exp() + 1) / 2, mu.abs(), (logvar.exp() + 1) / 2)


def torch_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """As every tutorial writes it, in the dtype of the result."""
    compute = compute_dtype(mu.dtype)
    mu, logvar, event = mu.to(compute), logvar.to(compute), mu.dim() - 1
    return reference.sum_event(-0.5 * (1 + logvar - mu**2 - logvar.exp()), event)


# ----------------------------------------------------------------------------------------- sampling


def check_sample(
    fused: bool, mu: Tensor, logvar: Tensor, backend: str, num_samples: int | None = None
) -> None:
    shape = tuple(mu.shape)
    eps = draws(shape, backend, compute_dtype(mu.dtype), num_samples=num_samples)
    upstream = upstream_like(eps.shape).to(mu.dtype)  # z has mu's dtype, and so has its gradient
    compute = compute_dtype(mu.dtype)

    def torchs(m: Tensor, lv: Tensor) -> Tensor:
        z = m.to(compute) + (lv.to(compute) / 2).exp() * eps.to(compute)
        return z.to(m.dtype)

    def oracle(m: Tensor, lv: Tensor) -> Tensor:
        return m + (lv / 2).exp() * eps

    def ours(m: Tensor, lv: Tensor) -> Tensor:
        return sample(fused, m, lv, num_samples=num_samples, backend=backend)

    z, grads = run(ours, [mu, logvar], upstream)
    assert z.dtype == mu.dtype
    torch_z, torch_grads = run(torchs, [mu, logvar], upstream)
    oracle_z, oracle_grads = run(oracle, [mu.double(), logvar.double()], upstream)

    noise = (logvar.double() / 2).exp() * eps.abs()
    weight = upstream.double()
    scales = [weight.sum_to_size(shape), (noise * weight / 2).sum_to_size(shape)]
    assert_as_good_as_torch(z, torch_z, oracle_z, what="z", scale=mu.double().abs() + noise)
    for name, got, want, exact, scale in zip(
        ("mu", "logvar"), grads, torch_grads, oracle_grads, scales, strict=True
    ):
        assert got.dtype == mu.dtype
        assert_as_good_as_torch(got, want, exact, what=f"gradient of {name}", scale=scale)


@samplers
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample_every_dtype_and_layout(
    fused: bool, dtype: torch.dtype, layout: str, backend: str
) -> None:
    mu, logvar = latents(LAYOUT_SHAPE, dtype)
    check_sample(fused, lay_out(mu, layout), lay_out(logvar, layout), backend)
    check_sample(fused, lay_out(mu, layout), logvar, backend)
    check_sample(fused, mu, lay_out(logvar, layout), backend, num_samples=3)


@samplers
@shapes
@pytest.mark.parametrize("num_samples", [None, 1, 3])
def test_sample_every_shape(
    fused: bool, shape: tuple[int, ...], num_samples: int | None, backend: str
) -> None:
    check_sample(fused, *latents(shape, torch.float32), backend, num_samples=num_samples)


@samplers
@dtypes
def test_sample_rows_of_whole_counters(fused: bool, dtype: torch.dtype, backend: str) -> None:
    """The four normals of a counter are 16 columns apart: here all four are one row's."""
    check_sample(fused, *latents((5, 128), dtype), backend, num_samples=3)


@dtypes
def test_draws_do_not_depend_on_the_dtype(dtype: torch.dtype, backend: str) -> None:
    eps = draws((7, 33), backend)
    assert torch.equal(eps, eps.float().double())  # a float32 number
    zeros = torch.zeros(7, 33, dtype=dtype)
    assert torch.equal(sample(False, zeros, zeros, backend=backend), eps.to(dtype))


@samplers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_draws_do_not_depend_on_the_layout(fused: bool, layout: str, backend: str) -> None:
    mu, logvar = (lay_out(t, layout) for t in latents(LAYOUT_SHAPE, torch.float32))
    z = sample(fused, mu, logvar, backend=backend)
    dense = sample(fused, mu.contiguous(), logvar.contiguous(), backend=backend)
    assert torch.equal(z, dense)


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("offset", [0, 5, 2**33])
def test_z_is_mu_plus_sigma_times_the_reference_noise(
    num_samples: int | None, offset: int, backend: str
) -> None:
    mu, logvar = (t.double() for t in latents((6, 5, 7), torch.float32))
    torch.manual_seed(SEED)
    seed = torch.ops.fastvae.seed.default(mu)
    assert seed.dtype == torch.int64 and seed.shape == (1,)
    z = sample(False, mu, logvar, num_samples=num_samples, sample_offset=offset, backend=backend)
    index = reference.noise_index((6, 5, 7), num_samples or 1, offset)
    expected = mu + (logvar / 2).exp() * reference.noise_at(seed, index)
    bound = (logvar / 2).exp() * noise_bound(reference.radius_at(seed, index))
    assert_within(z.view_as(expected), expected, bound, what="z")


@samplers
@pytest.mark.parametrize("num_samples", [None, 1, 4])
def test_a_split_batch_draws_as_the_whole(
    fused: bool, num_samples: int | None, backend: str
) -> None:
    mu, logvar = latents((11, 13), torch.float32)
    whole = sample(fused, mu, logvar, num_samples=num_samples, backend=backend)
    parts = [
        sample(
            fused,
            mu[start:stop],
            logvar[start:stop],
            num_samples=num_samples,
            sample_offset=start,
            backend=backend,
        )
        for start, stop in [(0, 4), (4, 5), (5, 11)]
    ]
    assert torch.equal(torch.cat(parts, dim=0 if num_samples is None else 1), whole)


@samplers
@pytest.mark.parametrize("num_samples", [None, 1, 3])
@pytest.mark.parametrize("cols", [13, 64])
def test_each_row_draws_the_noise_of_its_index(
    fused: bool, cols: int, num_samples: int | None, backend: str
) -> None:
    mu, logvar = latents((11, cols), torch.float32)
    upstream = upstream_like((num_samples or 1, 11, cols)).to(mu.device)

    def draw(rows: Tensor, **options: Any) -> list[Tensor]:
        """z and its gradients of these rows, samples first."""
        leaves = [t[rows].requires_grad_() for t in (mu, logvar)]
        z = sample(fused, *leaves, num_samples=num_samples, seed=SEED, backend=backend, **options)
        z = z.view(-1, *leaves[0].shape)
        return [z.detach().transpose(0, 1), *torch.autograd.grad(z, leaves, upstream[:, rows])]

    everything = torch.arange(11)
    whole = draw(everything)
    for rows in (everything, torch.tensor([7, 2, 10, 3, 0]), torch.tensor([5, 5])):
        for got, want in zip(draw(rows, sample_index=rows), whole, strict=True):
            assert torch.equal(got, want[rows])
    far = torch.tensor([2**40, 3, 2**40])[::2]  # a view, beyond 32 bits
    at_offset = draw(everything[:1], sample_offset=2**40)
    assert torch.equal(
        draw(everything[:2], sample_index=far)[0][0] - mu[0], at_offset[0][0] - mu[0]
    )


@samplers
def test_a_given_seed_is_the_generators(fused: bool, backend: str) -> None:
    mu, logvar = latents((5, 9), torch.float32)
    drawn = sample(fused, mu, logvar, backend=backend)
    torch.manual_seed(SEED)
    seed = torch.randint(2**63 - 1, (1,), device=mu.device)
    state = torch.get_rng_state()
    for given in (seed, int(seed), np.int64(int(seed))):
        z = fastvae.rsample(mu, logvar, seed=given, backend=backend)
        assert torch.equal(z, drawn)
    assert torch.equal(torch.get_rng_state(), state)


@samplers
def test_one_sample_is_the_plain_draw(fused: bool, backend: str) -> None:
    mu, logvar = latents((5, 9), torch.float32)
    one = sample(fused, mu, logvar, num_samples=1, backend=backend)
    assert one.shape == (1, 5, 9)
    assert torch.equal(one[0], sample(fused, mu, logvar, backend=backend))


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("offset", [0, 9])
@pytest.mark.parametrize("with_prior", [False, True])
def test_rsample_and_rsample_kl_agree(
    num_samples: int | None, offset: int, with_prior: bool, backend: str
) -> None:
    mu, logvar = latents((6, 21), torch.float32)
    prior = (torch.randn(21), torch.randn(6, 1)) if with_prior else None
    options = {"num_samples": num_samples, "sample_offset": offset, "backend": backend}
    torch.manual_seed(SEED)
    z, kl = fastvae.rsample_kl(mu, logvar, prior=prior, **options)
    assert torch.equal(z, sample(False, mu, logvar, **options))
    assert kl.shape == (6,)
    alone = fastvae.kl_divergence(mu, logvar, prior=prior, backend=backend)
    torch.testing.assert_close(kl, alone, rtol=5e-7, atol=0)


@samplers
def test_manual_seed_and_generator(fused: bool, backend: str) -> None:
    mu, logvar = latents((5, 20), torch.float32)
    first = sample(fused, mu, logvar, backend=backend)
    assert torch.equal(first, sample(fused, mu, logvar, backend=backend))

    generator = torch.Generator(mu.device).manual_seed(SEED)
    torch.manual_seed(5)
    undisturbed = torch.rand(4)
    torch.manual_seed(5)
    given = sample(fused, mu, logvar, generator=generator, backend=backend)
    assert torch.equal(given, first)
    assert torch.equal(torch.rand(4), undisturbed)  # the global generator stays where it was
    following = sample(fused, mu, logvar, generator=generator, backend=backend)
    assert not torch.isclose(following, given).any()


@samplers
def test_any_number_of_threads_gives_the_same_bits(
    fused: bool, quick_backend: str, one_and_two_threads: list[int]
) -> None:
    mu, logvar = latents((3001, 67), torch.float32)
    results = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        leaves = [mu.clone().requires_grad_(), logvar.clone().requires_grad_()]
        z = sample(fused, *leaves, num_samples=2, backend=quick_backend)
        kl = fastvae.kl_divergence(*leaves, backend=quick_backend)
        grads = torch.autograd.grad((z**2).sum() + kl.sum(), leaves)
        results.append([z.detach(), kl.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@samplers
def test_backward_twice_gives_the_same(fused: bool, backend: str) -> None:
    leaves = [t.requires_grad_() for t in latents((5, 33), torch.float32)]
    z = sample(fused, *leaves, num_samples=3, backend=backend)
    upstream = upstream_like(z.shape)
    first = torch.autograd.grad(z, leaves, upstream, retain_graph=True)
    torch.rand(1000)  # backward regenerates its noise from the saved seed, not from the generator
    second = torch.autograd.grad(z, leaves, upstream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@samplers
def test_sample_gradients_only_where_asked(fused: bool, backend: str) -> None:
    mu, logvar = latents((5, 33), torch.float32)
    _, every = run(lambda m, lv: sample(fused, m, lv, backend=backend), [mu, logvar])
    assert not sample(fused, mu, logvar, backend=backend).requires_grad
    for i in range(2):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((mu, logvar))]
        sample(fused, *leaves, backend=backend).sum().backward()
        assert leaves[1 - i].grad is None
        assert torch.equal(leaves[i].grad, every[i])
    with torch.no_grad():
        leaves = [mu.clone().requires_grad_(), logvar.clone().requires_grad_()]
        z = sample(fused, *leaves, backend=backend)
    assert not z.requires_grad
    assert torch.equal(z, sample(fused, mu, logvar, backend=backend))


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("with_prior", [False, True])
def test_gradcheck(num_samples: int | None, with_prior: bool, quick_backend: str) -> None:
    inputs = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    if with_prior:
        inputs += [torch.randn(4, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)]
    leaves = tuple(t.requires_grad_() for t in inputs)

    def function(mu: Tensor, logvar: Tensor, *prior: Tensor) -> Any:
        torch.manual_seed(SEED)
        return fastvae.rsample_kl(
            mu, logvar, prior=prior or None, num_samples=num_samples, backend=quick_backend
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)

    def alone(mu: Tensor, logvar: Tensor, *prior: Tensor) -> Tensor:
        return fastvae.kl_divergence(mu, logvar, prior=prior or None, backend=quick_backend)

    assert torch.autograd.gradcheck(alone, leaves)
    assert torch.autograd.gradgradcheck(alone, leaves)
