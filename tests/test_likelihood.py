"""log_likelihood against the oracle: every family, dtype, layout and shape, value and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    EXTREME_LOGITS,
    FAMILIES,
    LAYOUT_SHAPE,
    LAYOUTS,
    SHAPES,
    Family,
    assert_as_good_as_torch,
    assert_within,
    compute_dtype,
    lay_out,
    run,
    upstream_like,
)
from torch import Tensor

import fastvae
from fastvae import reference

WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def ours(family: Family, backend: str, mask: Tensor | None = None) -> Any:
    likelihood = family.make()

    def function(x: Tensor, *params: Tensor) -> Tensor:
        recon = params[0] if len(params) == 1 else params
        return fastvae.log_likelihood(recon, x, likelihood, mask=mask, backend=backend)

    return function


def check(
    family: Family,
    backend: str,
    inputs: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    upstream: Tensor | None = None,
    dtype: torch.dtype | None = None,
    sharp: bool = False,
) -> None:
    """Value and every gradient, against the oracle, with torch's own error as the yardstick.

    sharp: the value is relative to the sum of the terms themselves, not of their operands.
    """
    event_dims = inputs[0].dim() - 1
    compute = dtype or compute_dtype(inputs[1].dtype)
    wide = [t.detach().double() for t in inputs]

    def oracle(x: Tensor, *params: Tensor) -> Tensor:
        return reference.log_likelihood(x, params, family.name, mask=mask, **family.options)

    def torchs(x: Tensor, *params: Tensor) -> Tensor:
        terms = family.torchs(*(t.to(compute) for t in family.together((x, *params))))
        if mask is not None:
            terms = torch.where(mask, terms, 0.0)
        return reference.sum_event(terms, event_dims)

    # torch's formula sees no NaN behind a mask, where its gradient would be NaN too
    safe = inputs if mask is None else family.where(mask, inputs, 0.5)
    expected_shape = oracle(*wide).shape
    if upstream is None:
        upstream = upstream_like(expected_shape)
    value, grads = run(ours(family, backend, mask), inputs, upstream)
    torch_value, torch_grads = run(torchs, safe, upstream)
    oracle_value, oracle_grads = run(oracle, wide, upstream)
    oracle_grads = [g for g, t in zip(oracle_grads, inputs, strict=True) if t.is_floating_point()]

    terms, *sizes = family.magnitudes(*family.together([t.double() for t in safe]))
    if sharp:
        terms = reference.elementwise(
            wide[0], wide[1:], family.name, mask=mask, **family.options
        ).abs()
    kept = torch.ones((), dtype=torch.bool) if mask is None else mask
    row_scale = reference.sum_event(torch.where(kept, terms, 0.0), event_dims)
    assert_as_good_as_torch(value, torch_value, oracle_value, what="value", scale=row_scale)

    outer = upstream.double().abs().expand(expected_shape)
    of_leaves = [(t, s) for t, s in zip(inputs, sizes, strict=True) if t.is_floating_point()]
    for i, (leaf, size) in enumerate(of_leaves):
        of_rows = outer.reshape(*expected_shape, *(1,) * (size.dim() - outer.dim()))
        scale = torch.where(family.of_params(kept, inputs[0]), size * of_rows, 0.0).sum_to_size(
            leaf.shape
        )
        assert grads[i].dtype == leaf.dtype
        # a float64 x beside a float32 recon: its gradient was computed in float32
        ulps = 4 * torch.finfo(compute).eps / torch.finfo(leaf.dtype).eps
        assert_as_good_as_torch(
            grads[i],
            torch_grads[i],
            oracle_grads[i],
            what=f"gradient {i}",
            scale=scale,
            ulps=max(1.0, ulps),
        )


@families
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(
    family: Family, dtype: torch.dtype, layout: str, backend: str
) -> None:
    inputs = [lay_out(t, layout) for t in family.inputs(LAYOUT_SHAPE, dtype)]
    check(family, backend, inputs)


@families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_may_differ_between_inputs(family: Family, layout: str, backend: str) -> None:
    x, *params = family.inputs(LAYOUT_SHAPE, torch.float32)
    check(family, backend, [x, *(lay_out(p, layout) for p in params)])
    check(family, backend, [lay_out(x, layout), *params])


@families
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("num_samples", [None, 3])
def test_every_shape(
    family: Family, shape: tuple[int, ...], num_samples: int | None, backend: str
) -> None:
    check(family, backend, family.inputs(shape, torch.float32, num_samples))


@families
@dtypes
@pytest.mark.parametrize("layout", ["transposed", "expanded_batch", "misaligned"])
def test_sample_dimension(family: Family, dtype: torch.dtype, layout: str, backend: str) -> None:
    x, *params = family.inputs((5, 3, 17), dtype, num_samples=4)
    check(family, backend, [lay_out(x, layout), *(lay_out(p, layout) for p in params)])


@families
@dtypes
@pytest.mark.parametrize(
    "x_dtype", [*DTYPES, torch.uint8, torch.bool], ids=lambda d: str(d).removeprefix("torch.")
)
def test_x_of_another_dtype(
    family: Family, dtype: torch.dtype, x_dtype: torch.dtype, backend: str
) -> None:
    x, *params = family.inputs((4, 35), dtype)
    if not x.is_floating_point() and x_dtype.is_floating_point:
        x_dtype = dict(zip(DTYPES, WHOLE, strict=True))[x_dtype]
        x = x.clamp_max(127).to(x_dtype)
    else:
        x = x.to(x_dtype) if x_dtype.is_floating_point else (x > 0.5).to(x_dtype)
    wide = fastvae.log_likelihood(
        params[0] if len(params) == 1 else tuple(params), x, family.make(), backend=backend
    ).dtype
    if torch.float64 not in (dtype, x_dtype) or dtype == torch.float64:
        assert wide == compute_dtype(dtype)
    assert wide in (torch.float32, torch.float64)
    check(family, backend, [x, *params], dtype=wide)


def test_x_is_not_downcast(backend: str) -> None:
    x = torch.full((1, 1), 0.1)  # 0.1 in bfloat16 is 0.10009765625
    logits = torch.full((1, 1), 64.0, dtype=torch.bfloat16)
    value = fastvae.log_likelihood(logits, x, backend=backend)
    torch.testing.assert_close(value, torch.tensor([-57.6]), rtol=1e-6, atol=0)


@families
@dtypes
@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize(
    "mask_shape", [(4, 3, 17), (4, 1, 1), (1, 3, 17), (3, 17), (17,), (4, 3, 1), ()], ids=str
)
def test_mask(
    family: Family,
    dtype: torch.dtype,
    num_samples: int | None,
    mask_shape: tuple[int, ...],
    backend: str,
) -> None:
    x, *params = family.inputs((4, 3, 17), dtype, num_samples)
    mask = torch.rand(mask_shape) < 0.6
    _, *params = family.where(mask, [x, *params], float("nan"))
    hidden = ~mask.expand(x.shape)
    x = x.masked_fill(hidden, float("nan") if x.is_floating_point() else -1)
    check(family, backend, [x, *params], mask=mask)
    _, grads = run(ours(family, backend, mask), [x, *params])
    for grad in grads:
        assert (grad[family.of_params(hidden, x).expand(grad.shape)] == 0).all()


@families
def test_mask_hides_values_outside_the_domain(family: Family, backend: str) -> None:
    x, *params = family.inputs((3, 9), torch.float32)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 4] = False
    clean = ours(family, backend, mask)(x, *params)
    x[1, 4], params[0][1, ..., 4] = -7.0, -3.0
    torch.testing.assert_close(ours(family, backend, mask)(x, *params), clean, rtol=0, atol=0)


@dtypes
def test_extreme_logits(dtype: torch.dtype, backend: str) -> None:
    logits = torch.tensor(EXTREME_LOGITS, dtype=dtype)
    x = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-7, 1.0], dtype=dtype)
    logits, x = (t.flatten() for t in torch.meshgrid(logits, x, indexing="ij"))
    check(FAMILIES["bernoulli"], backend, [x, logits])  # one element a row: no error hides
    check(FAMILIES["bernoulli"], backend, [x.view(1, -1), logits.view(1, -1)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_confident_logits_keep_their_relative_accuracy(dtype: torch.dtype, backend: str) -> None:
    """x = 1, logit 20: -ln p is 2e-9, and all of its digits count."""
    size = torch.linspace(0, 80, 401, dtype=dtype)
    logits = torch.cat([size, -size])
    x = (logits > 0).to(dtype)
    check(FAMILIES["bernoulli"], backend, [x, logits], sharp=True)


@pytest.mark.parametrize("name", ["bernoulli_probs", "bernoulli_probs_log_min"])
@dtypes
def test_extreme_probs(name: str, dtype: torch.dtype, backend: str) -> None:
    eps = torch.finfo(dtype).eps
    p = torch.tensor([0.0, 1e-45, 1e-40, 1e-30, 1e-7, 0.5, 1 - eps, 1 - eps / 2, 1.0]).to(dtype)
    p, x = torch.meshgrid(p, torch.tensor([0.0, 0.3, 1.0], dtype=dtype), indexing="ij")
    check(FAMILIES[name], backend, [x.flatten(), p.flatten()], sharp=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logvar(dtype: torch.dtype, backend: str) -> None:
    logvar = torch.tensor([-60.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 60.0], dtype=dtype)
    logvar, x = torch.meshgrid(
        logvar, torch.tensor([-3.0, 0.0, 1e-3, 5.0], dtype=dtype), indexing="ij"
    )
    mean = torch.full_like(x.flatten(), 0.25)
    check(FAMILIES["gaussian_logvar"], backend, [x.flatten(), mean, logvar.flatten()])


def test_nan_logit_makes_its_row_nan(backend: str) -> None:
    logits = torch.randn(3, 40)
    logits[1, 7] = float("nan")
    value = fastvae.log_likelihood(logits, torch.rand(3, 40), backend=backend)
    assert value.isnan().tolist() == [False, True, False]


@families
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=["x_bf16", "x_f32"])
def test_bfloat16_gradients_are_float32_ones_rounded(
    family: Family, x_dtype: torch.dtype, native: None
) -> None:
    """To the bit, at every position in a group of vectors, also where one is cut off."""
    for columns in (*range(1, 70), 1023, 1025, 1041):
        x, *params = family.inputs((3, columns), torch.bfloat16)
        if any(p.shape != x.shape for p in params) and not family.sites:
            return  # one value a row: its gradient is a sum
        x = x.to(x_dtype) if x.is_floating_point() else x
        value, grads = run(ours(family, "cpp"), [x, *params])
        wide_x = x.float() if x.is_floating_point() else x
        wide_value, wide = run(ours(family, "cpp"), [wide_x, *(t.float() for t in params)])
        torch.testing.assert_close(value, wide_value, rtol=1e-6, atol=1e-4)
        for j, (narrow, exact) in enumerate(zip(grads, wide, strict=True)):
            assert torch.equal(narrow, exact.to(narrow.dtype)), (columns, j)


def test_bfloat16_gradients_keep_every_nan(native: None) -> None:
    """Rounding adds to the bits: those of a NaN must not overflow into a zero."""
    bits = torch.tensor([0x7FFF, 0x7F81, 0x7FC0, 0xFFFF, 0xFF81], dtype=torch.int32)
    nans = bits.to(torch.int16).view(torch.bfloat16).repeat(7)
    for x in (torch.zeros(1, 35, dtype=torch.bfloat16), torch.zeros(1, 35)):
        mean = nans[None].clone().requires_grad_()
        fastvae.log_likelihood(mean, x, "gaussian", backend="cpp").sum().backward()
        assert mean.grad is not None
        assert mean.grad.isnan().all()
    mean = torch.zeros(1, 35, dtype=torch.bfloat16, requires_grad=True)
    x = torch.full((1, 35), -1, dtype=torch.int32).view(torch.float32)  # a NaN of ones alone
    fastvae.log_likelihood(mean, x, "gaussian", backend="cpp").sum().backward()
    assert mean.grad is not None
    assert mean.grad.isnan().all()


def test_the_bound_fails_a_wrong_formula() -> None:
    """The yardstick itself: an error of one part in 10^5 in one element is caught."""
    oracle = torch.linspace(1, 2, 100, dtype=torch.float64)
    wrong = oracle.float()
    wrong[37] *= 1 + 1e-5
    with pytest.raises(AssertionError, match=r"worst at \(37,\)"):
        assert_as_good_as_torch(wrong, oracle.float(), oracle)
    assert_within(oracle.float(), oracle, torch.tensor(1.2e-7))
