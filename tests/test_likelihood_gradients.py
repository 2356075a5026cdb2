"""log_likelihood under autograd: upstream gradients, repeated backwards, what asks for one."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FAMILIES,
    Family,
    floating,
    leaves_of,
    run,
    upstream_like,
)
from test_likelihood import check, dtypes, families, ours

WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8]


@families
@dtypes
@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("kind", ["ones", "expanded", "float64", "float16", "int64", "loss_scale"])
def test_upstream_gradients(
    family: Family, dtype: torch.dtype, num_samples: int | None, kind: str, backend: str
) -> None:
    inputs = family.inputs((4, 19), dtype, num_samples)
    shape = (4,) if num_samples is None else (num_samples, 4)
    function = ours(family, backend)
    leaves = leaves_of(inputs)
    value = function(*leaves)
    upstream = {
        "ones": torch.ones(shape),
        "expanded": torch.tensor(-1.7).expand(shape),
        "float64": torch.rand(shape, dtype=torch.float64),
        "float16": torch.rand(shape, dtype=torch.float16),
        "int64": torch.randint(-3, 4, shape),
        # a tiny gradient must survive until a float16 run's loss scale has lifted it
        "loss_scale": torch.full(shape, 2.0**-9),
    }[kind]
    check(family, backend, [t.detach() for t in inputs], upstream=upstream.to(value.dtype))
    given = torch.autograd.grad(value, floating(leaves), upstream)
    _, expected = run(function, inputs, upstream.to(value.dtype))
    for got, want in zip(given, expected, strict=True):
        assert torch.equal(got, want)


def test_small_gradients_survive_loss_scaling(backend: str) -> None:
    """float16: p = 5e-7 is a coarse subnormal, but 2^12 p is an ordinary number."""
    logits = torch.linspace(-15, -12, 64, dtype=torch.float16).view(4, 16)
    check(
        FAMILIES["bernoulli"],
        backend,
        [torch.zeros(4, 16, dtype=torch.float16), logits],
        upstream=torch.full((4,), 2.0**12),
    )


@families
@pytest.mark.parametrize("num_samples", [None, 2])
def test_backward_twice_gives_the_same(
    family: Family, num_samples: int | None, backend: str
) -> None:
    leaves = leaves_of(family.inputs((5, 33), torch.float32, num_samples))
    value = ours(family, backend)(*leaves)
    upstream = upstream_like(value.shape)
    first = torch.autograd.grad(value, floating(leaves), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # the gradient belongs to the caller, who may write on it
    second = torch.autograd.grad(value, floating(leaves), upstream)
    for a, b in zip(kept, second, strict=True):
        assert torch.equal(a, b)


@families
def test_only_the_inputs_that_ask_get_a_gradient(family: Family, backend: str) -> None:
    inputs = family.inputs((4, 21), torch.float32)
    function = ours(family, backend)
    upstream = upstream_like((4,))
    _, every = run(function, inputs, upstream)
    assert not function(*inputs).requires_grad
    whole = len(inputs) - len(floating(inputs))  # x in front
    for i in range(whole, len(inputs)):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (function(*leaves) * upstream).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == j for j in range(len(inputs))]
        torch.testing.assert_close(leaves[i].grad, every[i - whole], rtol=2e-7, atol=0)


@families
@dtypes
def test_no_grad_gives_the_same_value(family: Family, dtype: torch.dtype, backend: str) -> None:
    leaves = leaves_of(family.inputs((4, 21), dtype))
    function = ours(family, backend)
    with torch.no_grad():
        value = function(*leaves)
    assert not value.requires_grad
    assert torch.equal(value, function(*leaves).detach())


@families
def test_inputs_are_not_written(family: Family, backend: str) -> None:
    inputs = family.inputs((4, 21), torch.float32)
    before = [t.clone() for t in inputs]
    run(ours(family, backend), inputs)
    for a, b in zip(before, inputs, strict=True):
        assert torch.equal(a, b)


@families
@pytest.mark.every_family
@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(
    family: Family, num_samples: int | None, masked: bool, quick_backend: str
) -> None:
    x, *params = family.inputs((3, 5), torch.float64, num_samples)
    if family.name == "bernoulli_probs":
        params = [0.2 + 0.6 * p for p in params]  # a clamped value has no matching gradient
    leaves = leaves_of([x, *params])
    mask = torch.rand(3, 5) < 0.5 if masked else None
    assert torch.autograd.gradcheck(ours(family, quick_backend, mask), leaves)
    assert torch.autograd.gradgradcheck(ours(family, quick_backend, mask), leaves)
