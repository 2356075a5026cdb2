"""The categorical likelihood, and with it the loop over sites: cross_entropy's conventions, where
the classes lie, many of them, logits of −∞, bad input."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import Tensor

import fastvae
from fastvae import reference
from fastvae.likelihoods import Categorical


def drawn(shape: Sequence[int], classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, *event = shape
    x = torch.randint(classes, tuple(shape))
    return [x, (3 * torch.randn(batch, classes, *event)).to(dtype)]


def value_and_grad(
    logits: Tensor, x: Tensor, likelihood: Categorical, backend: str, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = fastvae.log_likelihood(leaf, x, likelihood, mask=mask, backend=backend)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), grad


@pytest.mark.parametrize("shape", [(7,), (5, 9), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_cross_entropy(shape: tuple[int, ...], smoothing: float, backend: str) -> None:
    x, logits = drawn(shape, 6)
    likelihood = Categorical(label_smoothing=smoothing, ignore_index=2)
    value, grad = value_and_grad(logits, x, likelihood, backend)
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(
        leaf, x, reduction="none", label_smoothing=smoothing, ignore_index=2
    ).flatten(1 if x.dim() > 1 else 0)
    want = -(loss.sum(1) if x.dim() > 1 else loss)
    upstream = torch.linspace(0.5, 1.5, shape[0], dtype=torch.float64)
    (exact,) = torch.autograd.grad(want, leaf, upstream)
    torch.testing.assert_close(value.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("classes", [5, 16, 133])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_classes_may_lie_anywhere(
    num_samples: int | None, classes: int, dtype: torch.dtype, backend: str
) -> None:
    """The same numbers for every dim and layout; the gradient lies as the logits do."""
    if backend == "triton":  # interpreted, each class costs as much as all sites
        classes = 1 + classes // 16
    x, logits = drawn((3, 5, 7), classes, dtype)
    if num_samples:
        logits = torch.stack([logits, logits.flip(0)])
    front = logits.dim() - 3
    want = value_and_grad(logits, x, Categorical(), backend)
    for dim in (2, 3, -1, -2):
        where = dim if dim < 0 else dim + front - 1
        moved = logits.movedim(front, where)
        for given in (moved, moved.contiguous()):
            value, grad = value_and_grad(given, x, Categorical(dim), backend)
            torch.testing.assert_close(value, want[0], rtol=2e-6, atol=0)
            eps = 4 * torch.finfo(dtype).eps
            near = {"rtol": eps, "atol": eps if dtype.itemsize == 2 else 1e-7}
            torch.testing.assert_close(grad.movedim(where, front), want[1], **near)
            if given.is_contiguous() and dim in (-1, 3) and backend != "eager":
                assert grad.is_contiguous()


@pytest.mark.parametrize(
    ("batch", "event", "classes"),
    [
        (33, (), 5000),
        (2, (), 50_000),
        (1, (), 4097),
        (3, (40,), 1000),
        (70, (1,), 64),
        (2, (1025,), 3),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_many_classes(
    batch: int, event: tuple[int, ...], classes: int, last: bool, backend: str
) -> None:
    if backend == "triton":
        classes = 70 if classes > 70 else classes
    x, logits = drawn((batch, *event), classes)
    given = logits.movedim(1, -1).contiguous() if last else logits
    value, grad = value_and_grad(given, x, Categorical(-1 if last else 1), backend)
    exact = logits.double().requires_grad_()
    want = reference.log_likelihood(x, exact, "categorical")
    upstream = torch.linspace(0.5, 1.5, batch, dtype=torch.float64)
    (exact_grad,) = torch.autograd.grad(want, exact, upstream)
    near = 20 if backend == "eager" else 1  # torch's own
    torch.testing.assert_close(value.double(), want.detach(), rtol=near * 1e-6, atol=0)
    got = grad.movedim(-1, 1) if last else grad
    torch.testing.assert_close(got.double(), exact_grad, rtol=near * 2e-6, atol=near * 1e-8)


def test_a_nearly_certain_class_keeps_its_digits(backend: str) -> None:
    """ln p = −2e-9 is no 0, nor is its gradient; torch's float32 log_softmax gives both as 0."""
    gap = torch.linspace(0, 80, 401)
    logits = torch.stack([gap, -gap, torch.zeros(401)], 1)
    x = torch.zeros(401, dtype=torch.long)
    value, grad = value_and_grad(logits, x, Categorical(), backend)
    leaf = logits.double().requires_grad_()
    want = -torch.log1p((leaf[:, 1] - leaf[:, 0]).exp() + (leaf[:, 2] - leaf[:, 0]).exp())
    upstream = torch.linspace(0.5, 1.5, 401, dtype=torch.float64)
    (exact,) = torch.autograd.grad(want, leaf, upstream)
    least = 2.0**-23 if backend == "eager" else 1e-37  # torch's log_softmax
    torch.testing.assert_close(value.double(), want.detach(), rtol=4e-7, atol=least)
    torch.testing.assert_close(grad.double(), exact, rtol=6e-7, atol=least)


@pytest.mark.parametrize("classes", [5, 150])
def test_a_logit_of_minus_infinity_is_no_class(classes: int, backend: str) -> None:
    if backend == "triton":
        classes = 5 + classes // 50
    x, logits = drawn((4, 3), classes)
    x.clamp_(min=1)
    logits[:, 0] = -torch.inf
    value, grad = value_and_grad(logits, x, Categorical(), backend)
    fewer, of_fewer = value_and_grad(logits[:, 1:], x - 1, Categorical(), backend)
    torch.testing.assert_close(value, fewer)
    torch.testing.assert_close(grad[:, 1:], of_fewer)
    assert (grad[:, 0] == 0).all()
    impossible = fastvae.log_likelihood(logits, torch.zeros_like(x), "categorical", backend=backend)
    assert (impossible == -torch.inf).all()


@pytest.mark.parametrize("last", [False, True])
def test_a_mask_and_ignore_index_leave_out_nan(last: bool, backend: str) -> None:
    x, logits = drawn((4, 9), 7 if backend == "triton" else 150)
    likelihood = Categorical(-1 if last else 1, ignore_index=-100)
    mask = torch.rand(9) < 0.6
    hidden = ~mask.expand(4, 9) | (torch.rand(4, 9) < 0.2)
    clean = logits.clone()
    logits.movedim(1, -1)[hidden] = torch.nan
    x[~mask.expand(4, 9)] = 999
    x[hidden & mask] = -100
    given = logits.movedim(1, -1).contiguous() if last else logits
    value, grad = value_and_grad(given, x, likelihood, backend, mask)
    kept = torch.where(hidden, 0, x)
    log_p = clean.double().log_softmax(1).gather(1, kept[:, None])[:, 0]
    torch.testing.assert_close(value.double(), torch.where(hidden, 0, log_p).sum(1))
    grad = grad if last else grad.movedim(1, -1)
    assert (grad[hidden] == 0).all() and grad.isfinite().all()
    assert (grad[~hidden].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dim", [1, -1])
def test_weights_of_zero_and_reductions(dim: int, backend: str) -> None:
    """A sample of weight 0 has a gradient of 0, be its logits infinite; the others theirs."""
    x, logits = drawn((3, 4), 7 if backend == "triton" else 133)
    logits[1] = torch.inf
    given = logits.movedim(1, dim).contiguous().requires_grad_()
    weight = torch.tensor([2.0, 0.0, 0.5])
    loss = fastvae.elbo_loss(
        given, x, kl=torch.zeros(3), likelihood=Categorical(dim), sample_weight=weight,
        reduction="none", backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss[0] + loss[1] + loss[2], given)
    if backend != "eager":  # autograd's 0 · ∞
        assert (grad[1] == 0).all()
    leaf = logits.double().requires_grad_()
    terms = F.cross_entropy(leaf, x, reduction="none").sum(1)
    (exact,) = torch.autograd.grad(2 * terms[0] + 0.5 * terms[2], leaf)
    exact = exact.movedim(1, dim)
    torch.testing.assert_close(grad[[0, 2]].double(), exact[[0, 2]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(64, 300, 40), (3, 7, 5000), (40_000, 5), (9, 2000)], ids=str)
def test_results_do_not_depend_on_threads(shape: tuple[int, ...], native: None) -> None:
    batch, classes, *event = shape
    x, logits = torch.randint(classes, (batch, *event)), torch.randn(shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_grad(logits, x, Categorical(), "cpp"))
    finally:
        torch.set_num_threads(before)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])


def test_the_reconstruction_may_be_overwritten(backend: str) -> None:
    x, logits = drawn((4, 9), 7)
    weight = torch.randn(4, 7, 9, requires_grad=True)
    loss = fastvae.elbo_loss(
        logits + weight, x, kl=torch.zeros(4), likelihood="categorical", inplace_backward=True,
        backend=backend,
    )  # fmt: skip
    loss.backward()
    other = weight.detach().requires_grad_()
    (F.cross_entropy(logits + other, x, reduction="sum") / 4).backward()
    torch.testing.assert_close(weight.grad, other.grad)


def test_it_is_compiled_whole(native: None) -> None:
    torch._dynamo.reset()
    likelihood = Categorical(-1, ignore_index=0)

    def step(logits: Tensor, x: Tensor) -> Tensor:
        return fastvae.elbo_loss(logits, x, kl=logits.new_zeros(4), likelihood=likelihood)

    x, logits = torch.randint(7, (4, 9)), torch.randn(4, 9, 7, requires_grad=True)
    got = torch.compile(step, fullgraph=True)(logits, x)
    want = step(logits, x)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, logits), torch.autograd.grad(want, logits), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.float64])
def test_x_of_any_dtype(dtype: torch.dtype, backend: str) -> None:
    x, logits = drawn((4, 9), 7)
    want = value_and_grad(logits, x, Categorical(), backend)
    for got, expected in zip(
        value_and_grad(logits, x.to(dtype), Categorical(), backend), want, strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("classes", [3, 150])  # the second across the lanes
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_x_that_is_no_class(classes: int, backend: str) -> None:
    must = f"x must hold whole numbers from 0 to {classes - 1} for categorical, got "
    for bad, came in (
        (float(classes), f"values in [0.0, {classes}.0]"),
        (-1.0, "values in [-1.0, 0.0]: ignore_index leaves such elements out"),
        (0.5, "values in [0.0, 0.5]"),
        (float("nan"), "NaN"),
    ):
        x = torch.tensor([0.0, bad])
        with pytest.raises(ValueError) as error:
            fastvae.log_likelihood(torch.zeros(2, classes), x, "categorical", backend=backend)
        said = must + (came if backend == "eager" else came.replace(".0", ""))
        assert str(error.value) == said


@pytest.mark.parametrize(
    ("recon", "x", "likelihood", "message"),
    [
        ((4, 9), (4, 9), "categorical", "must have x's shape [4, 9]"),
        ((4, 7, 8), (4, 9), "categorical", "must have x's shape [4, 9]"),
        ((4, 0, 9), (4, 9), "categorical", "must have x's shape [4, 9]"),
        ((0, 4, 7, 9), (4, 9), "categorical", "at least one sample"),
        ((3, 7, 9), (4, 9), "categorical", "must have x's shape [4, 9]"),
        ((4, 9, 7), (4, 9), "categorical", "must have x's shape [4, 9]"),
        ((4, 7, 9), (4, 9), Categorical(-1), "must have x's shape [4, 9]"),
        ((4, 7, 9), (4, 9), Categorical(3), "the classes in dimension 3"),
        ((4, 7, 9), (4, 9), Categorical(0), "the classes in dimension 0"),
        ((4, 7, 9), (4, 9), Categorical(-3), "the classes in dimension -3"),
    ],
)
def test_shapes_that_do_not_fit(
    recon: tuple[int, ...], x: tuple[int, ...], likelihood: str | Categorical, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        fastvae.log_likelihood(torch.zeros(recon), torch.zeros(x, dtype=torch.long), likelihood)
    assert message in str(error.value) and str(list(recon)) in str(error.value)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="dim must be an int, got float"):
        Categorical(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ignore_index must be an int, got str"):
        Categorical(ignore_index="pad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        Categorical(label_smoothing=1.5)
    text = repr(Categorical(-1, label_smoothing=0.1, ignore_index=0))
    assert text == "Categorical(dim=-1, label_smoothing=0.1, ignore_index=0)"
