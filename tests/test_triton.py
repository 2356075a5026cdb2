"""The Triton kernels by themselves: on the GPU where there is one, else in the interpreter.

The noise's bits, agreement with C++, the launch rule. That the operators are right with them is
what the `backend` fixture tests; the vocabulary they are written in has test_triton_math.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import FAMILIES, Family, assert_within, noise_bound, run, upstream_like
from conftest import GPU
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae._triton import launch, rowwise
from fastvae._triton.formulas import formulas, likelihoods
from fastvae.likelihoods import registry

ops = torch.ops.fastvae
EPS = 2.0**-23


def plain(function: Callable[[], Any]) -> Any:
    """What the C++ kernels give."""
    from fastvae import _C

    before = _C.interpret(False)
    try:
        return function()
    finally:
        _C.interpret(before)


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
            lambda x, *p: ops.log_likelihood(x, p, likelihood.family, likelihood.options),
            [x, *params],
            upstream.to(x.device),
        )

    value, grads = both(*(t.to(triton_device) for t in inputs))
    cpp_value, cpp_grads = plain(lambda: both(*inputs))
    terms, *sizes = family.magnitudes(*(t.double() for t in inputs))
    near(value, cpp_value, terms.sum(1), 8, "value")
    for i, size in enumerate(sizes):
        near(grads[i], cpp_grads[i], size * upstream[:, None], 5, f"gradient {i}")


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


# ---------------------------------------------------------------------------------------- launching


@pytest.mark.parametrize("tile", [launch.TILE, launch.TILE // 2, 2 * launch.TILE])
@pytest.mark.parametrize("least", [1, 64])
@pytest.mark.parametrize("cols", [0, 1, 2, 3, 63, 64, 65, 784, 1023, 1024, 1025, 10**6])
def test_tile_shape(cols: int, least: int, tile: int) -> None:
    rows, columns = launch.tile_shape(cols, least, tile)
    assert rows * columns == tile
    assert columns.bit_count() == 1 and least <= columns <= tile
    assert columns >= min(cols, tile)
    assert columns == least or columns < 2 * max(cols, 1)


@pytest.mark.parametrize("row_programs", [1, 2, 3, 1000, 1024, 1025, 10**6])
@pytest.mark.parametrize("cols", [0, 1, 1024, 1025, 4097, 10**6, 2**31 + 5])
@pytest.mark.parametrize("columns", [64, 1024])
def test_splits(row_programs: int, cols: int, columns: int) -> None:
    split, chunk = launch.splits(row_programs, cols, columns)
    assert split >= 1 and chunk >= columns and chunk % columns == 0
    assert (split - 1) * chunk < max(cols, 1) <= max(split * chunk, 1)  # none is empty, all is done
    if row_programs >= launch.PROGRAMS or cols <= columns:
        assert split == 1
    assert split * row_programs < 2 * launch.PROGRAMS or split == 1
    tiles = triton.cdiv(cols, columns)
    assert 2 * split * row_programs >= min(launch.PROGRAMS, tiles * row_programs)


def test_index_type() -> None:
    def stored(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    small, far = stored(15), stored(2**31 + 5).as_strided((2, 5), (2**31, 1))
    assert launch.index_type(small.view(3, 5), None) is tl.int32
    assert launch.index_type(stored(1).expand(2**20, 2**40)) is tl.int32
    assert launch.index_type(stored(0).view(0, 7)) is tl.int32
    assert launch.index_type(stored(2**30, torch.float64)) is tl.int32  # elements are counted
    assert launch.index_type(small, None, far) is tl.int64
    assert launch.index_type(stored(2**31).view(2**16, 2**15)) is tl.int64
    # A tile that begins at the last element ends behind it.
    assert launch.index_type(stored(2**31 - launch.TILE, torch.uint8)) is tl.int64


class Spy:
    """Runs what is launched, and keeps it."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int, dict[str, Any]]] = []

    def __call__(self, kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
        self.launched.append((kernel.fn.__name__, programs, constexprs))
        with launch.launches_to(None):
            launch.launch(kernel, programs, *args, **constexprs)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.launched]


def test_rows_that_are_2_31_elements_apart(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pages that are touched exist: memory must not be filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    cols, stride = 40, 2**31 + 3
    storage = torch.empty(stride + cols, dtype=torch.uint8, device=triton_device)
    x = storage.as_strided((2, cols), (stride, 1))
    x.copy_(torch.arange(2 * cols).view(2, cols) % 7)
    mean = torch.randn(2, cols, device=triton_device)
    value, grad = torch.empty(2, device=triton_device), torch.empty(2, cols, device=triton_device)
    with launch.launches_to(spy := Spy()):
        rowwise("gaussian", [x, mean], None, None, [1.0, 0.0], 1.0, 2, value, [grad], [False, True])
    ((_, _, constexprs),) = spy.launched
    assert constexprs["INDEX"] is tl.int64
    difference = x.float() - mean
    torch.testing.assert_close(value, -0.5 * difference.square().sum(1))
    assert torch.equal(grad, difference)


def test_a_row_that_is_split_gives_the_same_bits_twice(triton_device: str) -> None:
    shape = (2, 9 * launch.TILE + 5)
    inputs = [torch.rand(shape), torch.randn(shape), torch.randn(2, 1)]
    mu, seed = torch.randn(shape, device=triton_device), torch.tensor([3], device=triton_device)

    def both(where: str) -> list[Tensor]:
        given = [t.to(where) for t in inputs]
        value, grads = run(lambda x, *p: ops.log_likelihood(x, p, "gaussian_logvar", [0.5]), given)
        return [value, *grads]

    with launch.launches_to(spy := Spy()):
        first = [*both(triton_device), *ops.rsample_kl(mu, mu, seed)]
        second = [*both(triton_device), *ops.rsample_kl(mu, mu, seed)]
    rows = [programs for name, programs, _ in spy.launched if name == "rowwise_kernel"]
    assert rows == [20, 20]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for got, cpp in zip(first, plain(lambda: both("cpu")), strict=False):
        torch.testing.assert_close(got.cpu(), cpp, rtol=3e-6, atol=1e-5)


@pytest.mark.skipif(GPU, reason="on a GPU the tensor's device decides")
def test_backward_runs_where_its_forward_did() -> None:
    mu, logvar, x = torch.randn(3, 7), torch.randn(3, 7), torch.rand(3, 7)
    leaves = [mu.requires_grad_(), logvar.requires_grad_()]
    with launch.launches_to(spy := Spy()):
        z, kl = fastvae.rsample_kl(*leaves, backend="triton")
        loss = fastvae.elbo_loss(z, x, kl=kl, backend="triton")
        assert spy.names == ["sample_kernel", "rowwise_kernel", "elbo_reduce_kernel"]
        fastvae.rsample(*leaves)  # by now CPU tensors go to C++ again
        assert len(spy.launched) == 3
        (3 * loss).backward()
        assert spy.names[3:] == ["scale_grad_kernel", "sample_backward_kernel"]
        fastvae.rsample_kl(*leaves)[0].sum().backward()
        assert len(spy.launched) == 5
    half = mu.detach().half().requires_grad_()
    with launch.launches_to(spy := Spy()):  # float16: the gradient is made in the backward
        fastvae.log_likelihood(half, x, backend="triton").sum().backward()
    assert spy.names == ["rowwise_kernel", "rowwise_kernel"]
