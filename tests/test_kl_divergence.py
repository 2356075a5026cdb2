"""kl_divergence, and rsample_kl's: values, gradients, dtypes, layouts, near the prior and far."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from cases import (
    LAYOUT_SHAPE,
    LAYOUTS,
    assert_as_good_as_torch,
    assert_within,
    compute_dtype,
    lay_out,
    run,
    upstream_like,
)
from test_latent import dtypes, latents, scale_kl, shapes, torch_kl
from torch import Tensor

import fastvae
from fastvae import reference


def kl_only(backend: str) -> Callable[..., Tensor]:
    return lambda mu, logvar, *prior: fastvae.kl_divergence(
        mu, logvar, prior=prior or None, backend=backend
    )


def kl_fused(backend: str) -> Callable[..., Tensor]:
    return lambda mu, logvar, *prior: fastvae.rsample_kl(
        mu, logvar, prior=prior or None, num_samples=2, backend=backend
    )[1]


kls = pytest.mark.parametrize("kl", [kl_only, kl_fused], ids=["kl_divergence", "rsample_kl"])


def check_kl(function: Callable[..., Tensor], mu: Tensor, logvar: Tensor) -> None:
    upstream = upstream_like(mu.shape[:1])
    value, grads = run(function, [mu, logvar], upstream)
    assert value.dtype == compute_dtype(mu.dtype)
    torch_value, torch_grads = run(torch_kl, [mu, logvar], upstream)
    wide = [mu.double(), logvar.double()]
    oracle_value, oracle_grads = run(reference.kl_divergence, wide, upstream)
    terms, *sizes = scale_kl(*wide)
    scale = reference.sum_event(terms, mu.dim() - 1)
    assert_as_good_as_torch(value, torch_value, oracle_value, what="kl", scale=scale)
    weight = upstream.double().view(-1, *(1,) * (mu.dim() - 1))
    for i, name in enumerate(("mu", "logvar")):
        assert grads[i].dtype == mu.dtype
        assert_as_good_as_torch(
            grads[i], torch_grads[i], oracle_grads[i], what=name, scale=sizes[i] * weight
        )


@kls
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kl_every_dtype_and_layout(kl: Any, dtype: torch.dtype, layout: str, backend: str) -> None:
    mu, logvar = latents(LAYOUT_SHAPE, dtype)
    check_kl(kl(backend), lay_out(mu, layout), lay_out(logvar, layout))
    check_kl(kl(backend), lay_out(mu, layout), logvar)


@kls
@shapes
def test_kl_every_shape(kl: Any, shape: tuple[int, ...], backend: str) -> None:
    check_kl(kl(backend), *latents(shape, torch.float32))


@kls
@dtypes
@pytest.mark.parametrize(
    "prior_shapes",
    [((4, 3, 17), (4, 3, 17)), ((17,), (3, 1)), ((), (4, 1, 1)), ((1, 3, 17), ())],
    ids=str,
)
def test_kl_with_a_prior(
    kl: Any, dtype: torch.dtype, prior_shapes: tuple[tuple[int, ...], ...], backend: str
) -> None:
    inputs = latents((4, 3, 17), dtype) + [torch.randn(s).to(dtype) for s in prior_shapes]
    upstream = upstream_like((4,))
    compute = compute_dtype(dtype)

    def torchs(*leaves: Tensor) -> Tensor:
        m, lv, m_p, lv_p = (t.to(compute) for t in leaves)
        terms = 0.5 * (lv_p - lv + (lv - lv_p).exp() + (m - m_p) ** 2 * (-lv_p).exp() - 1)
        return terms.sum((1, 2))

    def oracle(m: Tensor, lv: Tensor, m_p: Tensor, lv_p: Tensor) -> Tensor:
        return reference.kl_divergence(m, lv, (m_p, lv_p))

    value, grads = run(kl(backend), inputs, upstream)
    torch_value, torch_grads = run(torchs, inputs, upstream)
    wide = [t.double() for t in inputs]
    oracle_value, oracle_grads = run(oracle, wide, upstream)

    m, lv, m_p, lv_p = torch.broadcast_tensors(*wide)
    ratio, q = (lv - lv_p).exp(), (m - m_p) ** 2 * (-lv_p).exp()
    terms = (ratio + (lv - lv_p).abs() + q + 1) / 2
    pull = (m - m_p).abs() * (-lv_p).exp()
    weight = upstream.double().view(-1, 1, 1)
    sizes = [pull, (ratio + 1) / 2, pull, (ratio + q + 1) / 2]
    assert_as_good_as_torch(value, torch_value, oracle_value, what="kl", scale=terms.sum((1, 2)))
    for i, name in enumerate(("mu", "logvar", "mu_p", "logvar_p")):
        assert grads[i].dtype == dtype and grads[i].shape == inputs[i].shape
        scale = (sizes[i] * weight).sum_to_size(inputs[i].shape)
        assert_as_good_as_torch(grads[i], torch_grads[i], oracle_grads[i], what=name, scale=scale)


@kls
@pytest.mark.parametrize("asks", range(4))
def test_kl_gradients_only_where_asked(kl: Any, asks: int, backend: str) -> None:
    inputs = [*latents((5, 9), torch.float32), torch.randn(9), torch.randn(5, 1)]
    _, every = run(kl(backend), inputs)
    leaves = [t.detach().requires_grad_(i == asks) for i, t in enumerate(inputs)]
    kl(backend)(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == asks for i in range(4)]
    torch.testing.assert_close(leaves[asks].grad, every[asks], rtol=2e-6, atol=1e-6)


def near_the_prior(dtype: torch.dtype) -> Tensor:
    sizes = torch.logspace(-6, -0.3, 200, dtype=torch.float64)
    return torch.cat([sizes, -sizes, torch.tensor([1e-3, 0.1, -0.1, 0.5, -0.5])]).to(dtype)


@kls
@pytest.mark.parametrize("center", [0.0, 1.5])
def test_kl_near_the_prior_in_float32(kl: Any, center: float, backend: str) -> None:
    """exp(lv) - 1 - lv cancels: at 1e-6 torch's float32 keeps no digit of 5e-13. One element a
    row, so that the error of the small ones can't hide behind the large ones."""
    logvar = center + near_the_prior(torch.float32)
    mu = torch.full_like(logvar, center)
    prior = (torch.tensor(center), torch.tensor(center)) if center else ()
    value, grads = run(kl(backend), [mu, logvar, *prior])
    wide = [t.double() for t in (mu, logvar, *prior)]
    expected, expected_grads = run(
        lambda m, lv, *p: reference.kl_divergence(m, lv, p or None), wide
    )
    eps = torch.finfo(torch.float32).eps
    assert_within(value, expected, 4 * eps * expected, what="kl")
    slope = expected_grads[1].abs()
    assert_within(grads[1], expected_grads[1], 4 * eps * slope, what="gradient of logvar")


@kls
def test_kl_near_the_prior_in_float64(kl: Any, backend: str) -> None:
    logvar = near_the_prior(torch.float64)
    value = kl(backend)(torch.zeros_like(logvar), logvar)
    with mpmath.workdps(40):
        exact = [float((mpmath.expm1(lv) - mpmath.mpf(lv)) / 2) for lv in logvar.tolist()]
    expected = torch.tensor(exact, dtype=torch.float64)
    assert_within(value, expected, 4 * torch.finfo(torch.float64).eps * expected, what="kl")
    oracle = reference.kl_divergence(torch.zeros_like(logvar), logvar)
    assert_within(oracle, expected, 4 * torch.finfo(torch.float64).eps * expected, what="oracle")


def test_kl_of_the_prior_itself_is_exactly_zero(backend: str) -> None:
    zeros = torch.zeros(3, 7)
    assert torch.equal(fastvae.kl_divergence(zeros, zeros, backend=backend), torch.zeros(3))
    mu, logvar = latents((3, 7), torch.float32)
    value = fastvae.kl_divergence(mu, logvar, prior=(mu, logvar), backend=backend)
    assert torch.equal(value, torch.zeros(3))


@kls
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [12.0, -12.0, 20.0, -20.0])
def test_large_logvar_does_not_overflow(
    kl: Any, dtype: torch.dtype, size: float, backend: str
) -> None:
    """exp(12) is above float16's largest number; inside it's float32."""
    mu, logvar = (torch.full((2, 3), 0.5, dtype=dtype), torch.full((2, 3), size, dtype=dtype))
    value = kl(backend)(mu, logvar)
    expected = 3 * 0.5 * (0.25 + math.expm1(size) - size)
    torch.testing.assert_close(
        value.double(), torch.full((2,), expected).double(), rtol=1e-6, atol=0
    )
    if size < 20 or dtype != torch.float16:
        z = fastvae.rsample(mu, logvar, backend=backend)
        assert z.dtype == dtype and z.isfinite().all()
