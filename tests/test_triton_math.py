"""The Triton kernels' vocabulary, fastvae/_triton/math.py: errors in ULP over the float32 range.

On the GPU where there is one, else in the interpreter. The bounds are what the docstrings state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import GPU
from test_vec import all_exponents, ulps
from torch import Tensor

from fastvae._triton import launch, math


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
    "exp": (one_exp, torch.exp, all_exponents(TINY, HUGE), 1.2),
    "log": (one_log, torch.log, all_exponents(TINY, HUGE), 0.8),
    "log1p": (one_log1p, torch.log1p, all_exponents(TINY, HUGE), 0.8),
    "sqrt": (one_sqrt, torch.sqrt, all_exponents(2.0**-100, HUGE).abs(), 0.5),
}


@pytest.mark.parametrize("name", ONE)
def test_error_of(name: str, triton_device: str) -> None:
    function, exact, x, bound = ONE[name]
    if name == "sqrt" and GPU:  # whose rsqrt may be off, see there; the noise has its own test
        bound = 0.50001
    ends = ENDS if name != "sqrt" else ENDS[:1]  # of sqrt, what Box–Muller can give it
    x = torch.cat([x, ends])
    assert_ulps(apply(function, x, triton_device)[0], exact(x.double()), x, bound)


def test_error_of_exp_negative(triton_device: str) -> None:
    x = -all_exponents(TINY, 87.3).abs()
    assert_ulps(apply(one_exp_negative, x, triton_device)[0], x.double().exp(), x, 1.2)
    beyond = torch.tensor([-87.34, -90.0, -1e6, -3e38, float("-inf")])
    assert (apply(one_exp_negative, beyond, triton_device)[0] == 0).all()


def test_error_of_logistic(triton_device: str) -> None:
    """−ln σ(|x|), σ(x), σ(−x); what is less than the smallest normal number may be 0."""
    x = torch.cat([all_exponents(TINY, 87.3), ENDS[[0, 1, 4]]])
    wide = x.double()
    exact = [(-wide.abs()).exp().log1p(), wide.sigmoid(), (-wide).sigmoid()]
    for got, value in zip(apply(math.logistic, x, triton_device, 3), exact, strict=True):
        assert_ulps(got, value, x, 2.5)
    x = all_exponents(87.3, HUGE)
    x = x[x != 0]
    tail, p, q = apply(math.logistic, x, triton_device, 3)
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


def test_error_of_half_phi_expm1(triton_device: str) -> None:
    x = torch.cat([all_exponents(1e-18, 89.4), torch.linspace(-3, 3, 100_001), ENDS[[0, 1, 4]]])
    value, expm1 = apply(math.half_phi_expm1, x, triton_device, 2)
    assert (value[~x.isnan()] >= 0).all()
    assert_ulps(value, phi(x.double()) / 2, x, 2.5)
    assert_ulps(expm1, x.double().expm1() / 2, x, 2.5)
    least = apply(math.half_phi_expm1, all_exponents(TINY, 1e-18), triton_device, 2)
    assert (least[0] >= 0).all() and (least[0] <= 1e-36).all()


def test_error_of_sincospi(triton_device: str) -> None:
    x = torch.cat([torch.linspace(-1, 1, 1_000_001), all_exponents(TINY, 1.0)])
    for got, exact in zip(
        apply(math.sincospi, x, triton_device, 2), (torch.sin, torch.cos), strict=True
    ):
        assert (got.double() - exact(x.double() * torch.pi)).abs().max() < 1.2e-7


@pytest.mark.skipif(GPU, reason="here the hardware's own rsqrt and division are tested")
@pytest.mark.parametrize("off", [-2, -1, 1, 2])
def test_what_the_hardware_leaves_is_mended(
    off: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PTX's rsqrt and division are off by up to 2 ULP, the interpreter's are not. A square root in
    2^20 then lies so near the middle of two floats that it is rounded the other way."""
    from triton.runtime import interpreter

    def moved(method: Callable[..., Any]) -> Callable[..., Any]:
        def approximate(self: Any, *args: Any) -> Any:
            out = method(self, *args)
            if out.data.dtype == np.float32:
                near = (out.data.view(np.int32) + np.int32(off)).view(np.float32)
                out.data = np.where(out.data == 0, out.data, near)  # 0 / d is 0
            return out

        return approximate

    builder = interpreter.InterpreterBuilder
    for name in ("create_rsqrt", "create_fdiv"):
        monkeypatch.setattr(builder, name, moved(getattr(builder, name)))
    x = torch.linspace(1.0, 4.0, 2_000_001)
    assert_ulps(apply(one_sqrt, x, triton_device)[0], x.double().sqrt(), x, 0.50001)
    x = torch.cat([all_exponents(1e-12, HUGE, 100_000), torch.linspace(-1e-5, 1e-5, 100_001)])
    assert_ulps(apply(one_log1p, x, triton_device)[0], x.double().log1p(), x, 0.8)
    x = all_exponents(1e-30, 87.3, 100_000)
    for got, exact in zip(
        apply(math.logistic, x, triton_device, 3)[1:],
        (x.double().sigmoid(), (-x.double()).sigmoid()),
        strict=True,
    ):
        assert_ulps(got, exact, x, 2.5)
