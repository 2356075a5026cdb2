"""The Triton kernels by themselves: on the GPU where there is one, else in the interpreter.

The noise's bits, agreement with C++. That the operators are right with them is what the `backend`
fixture tests; the vocabulary they are written in has test_triton_math.py, and how they are launched
test_triton_launch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FAMILIES, Family, assert_within, noise_bound, run, upstream_like
from torch import Tensor

from fastvae import reference
from fastvae._triton.formulas import formulas, likelihoods
from fastvae.likelihoods import registry

ops = torch.ops.fastvae
EPS = 2.0**-23


def plain(function: Callable[[], Any]) -> Any:
    """What the C++ kernels give."""
    from fastvae import _C

    before = _C.to_triton(False)
    try:
        return function()
    finally:
        _C.to_triton(before)


def test_formulas_are_those_of_cpp_and_python(native: None) -> None:
    from fastvae import _C

    assert sorted(likelihoods) == sorted(registry) == sorted(_C.likelihoods())
    assert set(formulas) == {*likelihoods, "standard_kl", "normal_kl"}


# -------------------------------------------------------------------------------------------- noise

SEEDS = [0, 0xFFFFFFFF, 1 << 32, 0x123456789ABCDEF0, 2**63 - 2]


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
@pytest.mark.parametrize(
    ("size", "num_samples", "offset"),
    [
        ((1,), 1, 0),
        ((7,), 3, 2**33 + 1),
        ((3, 1), 1, 63),
        ((5, 13), 4, 3),
        ((2, 64), 1, 1),
        ((3, 65), 2, 1),
        ((9, 4, 3, 5), 2, 11),
        ((2, 128), 3, 2**33),
        ((2, 8, 24), 2, 2**32 - 1),
        ((2, 4160), 1, 5),
        ((1, 6001), 2, 7),
        ((5, 17), 1, 2**31),
        ((5, 17), 3, 2**40 + 1),
        ((4, 64), 2, 2**40),
        ((4, 64), 1, 2**56),
        ((0, 17), 3, 0),
        ((4, 0), 2, 0),
    ],
    ids=str,
)
def test_noise_has_the_bits_of_cpp(
    size: tuple[int, ...], num_samples: int, offset: int, seed: int, triton_device: str
) -> None:
    from fastvae import _C

    key = torch.tensor([seed])
    ours = ops.noise(key.to(triton_device), list(size), num_samples, offset).cpu()
    if _C.build_info()["isa"] != "DEFAULT":  # whose multiply-add has two roundings
        assert torch.equal(ours, plain(lambda: ops.noise(key, list(size), num_samples, offset)))
        return
    index = reference.noise_index(size, num_samples, offset)
    bound = noise_bound(reference.radius_at(key, index))
    assert_within(ours, reference.noise_at(key, index), bound, what="noise")


# -------------------------------------------------------------------------------------- against C++


def near(got: Tensor, cpp: Tensor, scale: Tensor, roundings: float, what: str) -> None:
    assert_within(got.cpu(), cpp, roundings * EPS * scale.double() + 1e-37, what=what)


@pytest.mark.every_family
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("shape", [(3, 7), (5, 33), (2, 3000)], ids=str)
def test_likelihoods_agree_with_cpp(
    family: Family, shape: tuple[int, ...], triton_device: str
) -> None:
    inputs = family.inputs(shape, torch.float32)
    likelihood = family.make()
    upstream = upstream_like(shape[:1])

    def both(x: Tensor, *params: Tensor) -> tuple[Tensor, list[Tensor]]:
        return run(
            lambda x, *p: ops.log_likelihood(
                x, family.params(x, p), likelihood.family, likelihood.options
            ),
            [x, *params],
            upstream.to(x.device),
        )

    value, grads = both(*(t.to(triton_device) for t in inputs))
    cpp_value, cpp_grads = plain(lambda: both(*inputs))
    terms, *sizes = family.magnitudes(*(t.double() for t in inputs))
    near(value, cpp_value, terms.sum(1), 8, "value")
    for i, size in enumerate(sizes[-len(grads) :]):
        of_rows = upstream.view(-1, *[1] * (size.dim() - 1))
        near(grads[i], cpp_grads[i], size * of_rows, 5, f"gradient {i}")


@pytest.mark.parametrize("shape", [(3, 7), (5, 128), (2, 3000)], ids=str)
@pytest.mark.parametrize("num_samples", [None, 3])
def test_latents_agree_with_cpp(
    shape: tuple[int, ...], num_samples: int | None, triton_device: str
) -> None:
    inputs, seed = [torch.randn(shape), torch.randn(shape)], torch.tensor([5])
    prior = [torch.randn(shape), torch.randn(shape)]

    def both(where: str) -> list[Tensor]:
        mu, logvar, *rest = (t.to(where).requires_grad_() for t in (*inputs, *prior))
        z, kl = ops.rsample_kl(mu, logvar, seed.to(where), num_samples, 2**34)
        to_prior = ops.kl_divergence(mu, logvar, *rest)
        loss = z.sum() + 0.7 * kl.sum() + 0.3 * to_prior.sum()
        grads = torch.autograd.grad(loss, (mu, logvar, *rest))
        return [t.detach() for t in (z, kl, to_prior, *grads)]

    z, kl, to_prior, *grads = both(triton_device)
    cpp_z, cpp_kl, cpp_to_prior, *cpp_grads = plain(lambda: both("cpu"))
    mu, logvar, prior_mu, prior_logvar = (t.double() for t in (*inputs, *prior))
    sigma = (logvar / 2).exp()
    near(z, cpp_z, cpp_z.abs().double() + mu.abs() + 6 * sigma, 1, "z")
    near(kl, cpp_kl, cpp_kl, 8, "kl")
    near(to_prior, cpp_to_prior, cpp_to_prior, 16, "kl to a prior")
    ratio = (logvar - prior_logvar).exp() + (mu - prior_mu) ** 2 * (-prior_logvar).exp()
    size = mu.abs() + prior_mu.abs() + 8 * sigma + logvar.exp() + ratio + 4
    for i, (got, cpp) in enumerate(zip(grads, cpp_grads, strict=True)):
        near(got, cpp, size * (1 + (-prior_logvar).exp()), 8, f"gradient {i}")
