"""The Triton kernels by themselves: on the GPU where there is one, else in the interpreter.

The vocabulary's errors in ULP over the float32 range, the noise's bits, the launch rule. That the
operators are right with them is what the `backend` fixture tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import FAMILIES, Family, assert_within, noise_bound, run, upstream_like
from conftest import GPU, require
from test_vec import all_exponents, ulps
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae._triton import launch, math, rowwise
from fastvae._triton.formulas import formulas, likelihoods
from fastvae.likelihoods import registry

ops = torch.ops.fastvae
EPS = 2.0**-23


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if GPU else "cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run; CPU tensors go to the interpreter."""
    require("triton")
    from fastvae import _C

    before = _C.interpret(not GPU)
    yield request.param
    _C.interpret(before)


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


# --------------------------------------------------------------------------------------- vocabulary


@triton.jit
def apply_kernel(x, outs, count, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    results = FUNCTION(tl.load(x + i, mask=i < count, other=1.0))
    for j in tl.static_range(len(outs)):
        tl.store(outs[j] + i, results[j], mask=i < count)


@triton.jit
def one_exp(x):
    return (math.exp(x),)


@triton.jit
def one_exp_negative(x):
    return (math.exp_negative(x),)


@triton.jit
def one_log(x):
    return (math.log(x),)


@triton.jit
def one_log1p(x):
    return (math.log1p(x),)


@triton.jit
def one_sqrt(x):
    return (math.sqrt(x),)


def apply(function: Any, x: Tensor, device: str, results: int = 1) -> list[Tensor]:
    given = x.to(device)
    outs = tuple(torch.empty_like(given) for _ in range(results))
    block = 1024 if GPU else 2**17
    launch.launch(
        apply_kernel,
        triton.cdiv(len(x), block),
        given,
        outs,
        len(x),
        FUNCTION=function,
        BLOCK=block,
    )
    return [t.cpu() for t in outs]


def assert_ulps(got: Tensor, exact: Tensor, x: Tensor, bound: float) -> None:
    error = ulps(got, exact)
    at = int(error.nan_to_num(nan=float("inf")).argmax())
    assert error[at] <= bound, f"{error[at]:.3g} ULP at {x[at]:.9g}: {got[at]:.9g}"
    assert torch.equal(got.isnan(), exact.isnan())


ENDS = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
TINY, HUGE = 1e-45, 3.4e38  # every float32, subnormals too
ONE = {  # function, its exact value, arguments, bound in ULP
    "exp": (one_exp, torch.exp, all_exponents(TINY, HUGE), 1.0),
    "log": (one_log, torch.log, all_exponents(TINY, HUGE), 0.8),
    "log1p": (one_log1p, torch.log1p, all_exponents(TINY, HUGE), 0.8),
    "sqrt": (one_sqrt, torch.sqrt, all_exponents(2.0**-100, HUGE).abs(), 0.5),
}


@pytest.mark.parametrize("name", ONE)
def test_error_of(name: str, device: str) -> None:
    function, exact, x, bound = ONE[name]
    ends = ENDS if name != "sqrt" else ENDS[:1]  # of sqrt, what Box–Muller can give it
    x = torch.cat([x, ends])
    assert_ulps(apply(function, x, device)[0], exact(x.double()), x, bound)


def test_error_of_exp_negative(device: str) -> None:
    x = -all_exponents(TINY, 87.3).abs()
    assert_ulps(apply(one_exp_negative, x, device)[0], x.double().exp(), x, 1.0)
    beyond = torch.tensor([-87.34, -90.0, -1e6, -3e38, float("-inf")])
    assert (apply(one_exp_negative, beyond, device)[0] == 0).all()


def test_error_of_logistic(device: str) -> None:
    """−ln σ(|x|), σ(x), σ(−x); what is less than the smallest normal number may be 0."""
    x = torch.cat([all_exponents(TINY, 87.3), ENDS[[0, 1, 4]]])
    wide = x.double()
    exact = [(-wide.abs()).exp().log1p(), wide.sigmoid(), (-wide).sigmoid()]
    for got, value in zip(apply(math.logistic, x, device, 3), exact, strict=True):
        assert_ulps(got, value, x, 2.5)
    x = all_exponents(87.3, HUGE)
    x = x[x != 0]
    tail, p, q = apply(math.logistic, x, device, 3)
    positive = x > 0
    assert torch.equal(torch.where(positive, p, q), torch.ones_like(x))
    small = torch.where(positive, q, p)
    assert ((tail >= 0) & (tail < 1.3e-38) & (small >= 0) & (small < 1.3e-38)).all()


def phi(d: Tensor) -> Tensor:
    """e^d − 1 − d in float64, by its series where that cancels."""
    series = torch.full_like(d, 1.0)
    for k in range(16, 2, -1):
        series = 1 + series * d / k
    return torch.where(d.abs() < 0.5, series * d * d / 2, d.expm1() - d)


def test_error_of_phi_expm1(device: str) -> None:
    x = torch.cat([all_exponents(1e-18, 88.0), torch.linspace(-3, 3, 100_001), ENDS[[0, 1, 4]]])
    value, expm1 = apply(math.phi_expm1, x, device, 2)
    assert (value[~x.isnan()] >= 0).all()
    assert_ulps(value, phi(x.double()), x, 2.5)
    assert_ulps(expm1, x.double().expm1(), x, 2.5)
    least = apply(math.phi_expm1, all_exponents(TINY, 1e-18), device, 2)
    assert (least[0] >= 0).all() and (least[0] <= 1e-36).all()


def test_error_of_sincospi(device: str) -> None:
    x = torch.cat([torch.linspace(-1, 1, 1_000_001), all_exponents(TINY, 1.0)])
    for got, exact in zip(apply(math.sincospi, x, device, 2), (torch.sin, torch.cos), strict=True):
        assert (got.double() - exact(x.double() * torch.pi)).abs().max() < 1.2e-7


@pytest.mark.skipif(GPU, reason="here the hardware's own rsqrt and division are tested")
@pytest.mark.parametrize("off", [-2, -1, 1, 2])
def test_sqrt_and_logistic_mend_what_the_hardware_leaves(
    off: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PTX's rsqrt and division are off by up to 2 ULP, the interpreter's are not. A square root in
    2^20 then lies so near the middle of two floats that it is rounded the other way."""
    from triton.runtime import interpreter

    def moved(method: Callable[..., Any]) -> Callable[..., Any]:
        def approximate(self: Any, *args: Any) -> Any:
            out = method(self, *args)
            if out.data.dtype == np.float32:
                out.data = (out.data.view(np.int32) + np.int32(off)).view(np.float32)
            return out

        return approximate

    builder = interpreter.InterpreterBuilder
    for name in ("create_rsqrt", "create_fdiv"):
        monkeypatch.setattr(builder, name, moved(getattr(builder, name)))
    x = torch.linspace(1.0, 4.0, 2_000_001)
    assert_ulps(apply(one_sqrt, x, device)[0], x.double().sqrt(), x, 0.50001)
    x = all_exponents(1e-30, 87.3, 100_000)
    for got, exact in zip(
        apply(math.logistic, x, device, 3)[1:],
        (x.double().sigmoid(), (-x.double()).sigmoid()),
        strict=True,
    ):
        assert_ulps(got, exact, x, 2.5)


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
    size: tuple[int, ...], num_samples: int, offset: int, seed: int, device: str
) -> None:
    from fastvae import _C

    key = torch.tensor([seed])
    ours = ops.noise(key.to(device), list(size), num_samples, offset).cpu()
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
def test_likelihoods_agree_with_cpp(family: Family, shape: tuple[int, ...], device: str) -> None:
    inputs = family.inputs(shape, torch.float32)
    likelihood = family.make()
    upstream = upstream_like(shape[:1])

    def both(x: Tensor, *params: Tensor) -> tuple[Tensor, list[Tensor]]:
        return run(
            lambda x, *p: ops.log_likelihood(x, p, likelihood.family, likelihood.options),
            [x, *params],
            upstream.to(x.device),
        )

    value, grads = both(*(t.to(device) for t in inputs))
    cpp_value, cpp_grads = plain(lambda: both(*inputs))
    terms, *sizes = family.magnitudes(*(t.double() for t in inputs))
    near(value, cpp_value, terms.sum(1), 8, "value")
    for i, size in enumerate(sizes):
        near(grads[i], cpp_grads[i], size * upstream[:, None], 5, f"gradient {i}")


@pytest.mark.parametrize("shape", [(3, 7), (5, 128), (2, 3000)], ids=str)
@pytest.mark.parametrize("num_samples", [None, 3])
def test_latents_agree_with_cpp(
    shape: tuple[int, ...], num_samples: int | None, device: str
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

    z, kl, to_prior, *grads = both(device)
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
    def view(shape: tuple[int, ...], *strides: int) -> Tensor:
        return torch.empty(1, device="meta").as_strided(shape, strides)

    small, far = view((3, 5), 5, 1), view((2, 5), 2**31, 1)
    assert launch.index_type(small, None) is tl.int32
    assert launch.index_type(view((2**20, 2**40), 0, 0)) is tl.int32
    assert launch.index_type(view((0, 7), 2**40, 1)) is tl.int32
    assert launch.index_type(small, None, far) is tl.int64
    assert launch.index_type(view((2**16, 2**15), 2**15, 1)) is tl.int64
    # A tile that begins at the last element ends behind it.
    assert launch.index_type(view((2**31 - launch.TILE,), 1)) is tl.int64
    assert launch.index_type(view((2**30,), 1)) is tl.int32


class Spy:
    """Runs what is launched, and keeps it."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int, dict[str, Any]]] = []

    def __call__(self, kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
        self.launched.append((kernel.fn.__name__, programs, constexprs))
        with np.errstate(all="ignore"):
            kernel[(programs,)](*args, **constexprs)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.launched]


def test_rows_that_are_2_31_elements_apart(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the pages that are touched exist: memory must not be filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    cols, stride = 40, 2**31 + 3
    storage = torch.empty(stride + cols, dtype=torch.uint8, device=device)
    x = storage.as_strided((2, cols), (stride, 1))
    x.copy_(torch.arange(2 * cols).view(2, cols) % 7)
    mean = torch.randn(2, cols, device=device)
    value, grad = torch.empty(2, device=device), torch.empty(2, cols, device=device)
    with launch.launches_to(spy := Spy()):
        rowwise("gaussian", [x, mean], None, None, [1.0, 0.0], 1.0, 2, value, [grad], [False, True])
    ((_, _, constexprs),) = spy.launched
    assert constexprs["INDEX"] is tl.int64
    difference = x.float() - mean
    torch.testing.assert_close(value, -0.5 * difference.square().sum(1))
    assert torch.equal(grad, difference)


def test_a_row_that_is_split_gives_the_same_bits_twice(device: str) -> None:
    shape = (2, 9 * launch.TILE + 5)
    inputs = [torch.rand(shape), torch.randn(shape), torch.randn(2, 1)]
    mu, seed = torch.randn(shape, device=device), torch.tensor([3], device=device)

    def both(where: str) -> list[Tensor]:
        given = [t.to(where) for t in inputs]
        value, grads = run(lambda x, *p: ops.log_likelihood(x, p, "gaussian_logvar", [0.5]), given)
        return [value, *grads]

    with launch.launches_to(spy := Spy()):
        first = [*both(device), *ops.rsample_kl(mu, mu, seed)]
        second = [*both(device), *ops.rsample_kl(mu, mu, seed)]
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
        fastvae.log_likelihood(x, half, backend="triton").sum().backward()
    assert spy.names == ["rowwise_kernel", "rowwise_kernel"]
