"""Generated input of any shape, dtype and layout: plain PyTorch's answer, or a clear error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bad import NAN, backends
from conftest import require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastvae
from fastvae.likelihoods import Bernoulli, BernoulliProbs, Gaussian, Likelihood

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
Draw = Callable[[Any], Any]
generated = settings(
    max_examples=int(os.environ.get("FASTVAE_EXAMPLES", "120")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SIZES = st.sampled_from([0, 1, 1, 2, 3, 3, 5, 7, 8, 13, 17, 20])


def draw_shape(draw: Draw, most: int = 2500) -> list[int]:
    """[B, *event] with 0 to 5 event dimensions."""
    shape = draw(st.lists(SIZES, min_size=1, max_size=6))
    while math.prod(shape) > most:
        shape[shape.index(max(shape))] = 2
    return shape


def draw_strides(draw: Draw, shape: Sequence[int]) -> list[int]:
    rank = len(shape)
    kinds = ["contiguous", "permuted", "channels_last", "gaps", "expanded", "overlapping", "far"]
    kind = draw(st.sampled_from(kinds))
    order = list(range(rank))  # outermost first
    if kind in ("permuted", "gaps", "expanded"):
        order = draw(st.permutations(order))
    elif kind == "channels_last" and rank > 1:
        order = [0, *order[2:], 1]
    strides, step = [0] * rank, 1
    for d in reversed(order):
        if kind == "expanded" and draw(st.booleans()):
            continue
        step *= draw(st.integers(1, 3)) if kind == "gaps" else 1
        strides[d] = draw(st.integers(0, 3)) if kind == "overlapping" else step
        if kind == "far" and d == order[0]:
            strides[d] += 2**14 + 3
        step *= max(shape[d], 1)
    for d in range(rank):  # a dimension of one may claim anything
        if shape[d] == 1 and draw(st.booleans()):
            strides[d] = draw(st.sampled_from([0, 1, 7, 2**40]))
    return strides


def draw_tensor(
    draw: Draw, shape: Sequence[int], dtype: torch.dtype, low: float, high: float
) -> Tensor:
    """A tensor in some layout; what its storage holds beside it is NaN, or the largest integer."""
    strides, offset = draw_strides(draw, shape), draw(st.integers(0, 5))
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.rand(offset + reach + 3, dtype=torch.float64, generator=generator)
    storage = (low + (high - low) * values).to(dtype)
    if dtype in (torch.uint8, torch.bool):
        storage = (values > 0.5).to(dtype)
    seen = torch.zeros(len(storage), dtype=torch.bool)
    seen[torch.arange(len(storage)).as_strided(shape, strides, offset).flatten()] = True
    storage[~seen] = NAN if dtype.is_floating_point else 255
    return storage.as_strided(shape, strides, offset)


def draw_broadcast(draw: Draw, shape: Sequence[int]) -> list[int]:
    """A shape that broadcasts to this one."""
    kept = [n if draw(st.booleans()) else 1 for n in shape]
    return kept[draw(st.integers(0, len(kept))) :]


def sum_event(terms: Tensor, event_dims: int) -> Tensor:
    return terms.flatten(-event_dims).sum(-1) if event_dims else terms


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def near(ours: Tensor, exact: Tensor, bound: Tensor | float, what: str) -> None:
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, not {list(exact.shape)}"
    excess = (ours.double() - exact).abs() - bound
    worst = excess.max().item() if excess.numel() else 0.0
    assert excess.isfinite().all() and worst <= 0, f"{what}: {worst} over the bound"


def compare(
    draw: Draw,
    ours: Callable[..., Tensor],
    plain: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Values and gradients against `plain`, which gives (value, sum of magnitudes) in float64."""
    leaves = [t.requires_grad_(t.is_floating_point() and draw(st.booleans())) for t in inputs]
    before = [t.detach().clone() for t in leaves]
    value = ours(*leaves)
    exact_leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    exact, size = plain(*exact_leaves)
    assert value.dtype == dtype
    floats = {value_dtype(t.dtype) for t in inputs if t.is_floating_point()}
    least = max(ROUNDING[d] for d in floats)  # a float64 result may hold what float32 gave
    rounding = max(least, ROUNDING[dtype])
    near(value.detach(), exact.detach(), rounding * (1 + size.detach()), "value")
    wanted = [j for j, t in enumerate(leaves) if t.requires_grad]
    if wanted:
        upstream = draw_tensor(draw, value.shape, value.dtype, 0.5, 1.5)
        args = [leaves[j] for j in wanted], [exact_leaves[j] for j in wanted]
        ours_grads = torch.autograd.grad(value, args[0], upstream)
        plain_grads = torch.autograd.grad(exact, args[1], upstream.double())
        for j, got, grad in zip(wanted, ours_grads, plain_grads, strict=True):
            assert got.dtype == leaves[j].dtype
            terms = max(t.numel() for t in inputs) / max(grad.numel(), 1)  # in each element's sum
            scale = 4 * math.sqrt(terms) + (grad.abs().max().item() if grad.numel() else 0.0)
            near(got, grad, max(least, ROUNDING[got.dtype]) * scale, f"gradient of input {j}")
    for t, was in zip(leaves, before, strict=True):
        torch.testing.assert_close(t.detach(), was, rtol=0, atol=0, equal_nan=True)


def plain_kl(mu: Tensor, logvar: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
    mean, lv = prior or (torch.zeros_like(mu), torch.zeros_like(mu))
    d = logvar - lv
    square, phi = (mu - mean) ** 2 * (-lv).exp(), d.expm1() - d
    dims = mu.dim() - 1
    return sum_event(0.5 * (square + phi), dims), sum_event(square + phi.abs() + d.abs(), dims)


def plain_given_kl(kl: Tensor) -> tuple[Tensor, Tensor]:
    return kl, kl.abs()


@backends
@generated
@given(data=st.data())
def test_generated_kl_divergence(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape, dtype = draw_shape(draw), draw(st.sampled_from(FLOATS))
    sizes = [shape, shape]
    if draw(st.booleans()):
        sizes += [draw_broadcast(draw, shape) for _ in range(2)]
    inputs = [draw_tensor(draw, s, dtype, -2, 2) for s in sizes]

    def ours(mu: Tensor, logvar: Tensor, *given: Tensor) -> Tensor:
        prior: Any = given or None
        return fastvae.kl_divergence(mu, logvar, prior=prior, backend=backend)

    compare(draw, ours, plain_kl, inputs, value_dtype(dtype))


@backends
@generated
@given(data=st.data())
def test_generated_rsample(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape, dtype = draw_shape(draw), draw(st.sampled_from(FLOATS))
    inputs = [draw_tensor(draw, shape, dtype, -2, 2) for _ in range(2)]
    seed = draw(st.integers(0, 2**40))
    how: dict[str, Any] = {
        "num_samples": draw(st.sampled_from([None, 1, 2, 5])),
        "backend": backend,
    }
    how["sample_offset"] = draw(st.sampled_from([0, 1, 63, 2**33 + 1]))

    def sample(mu: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.rsample(mu, logvar, generator=torch.manual_seed(seed), **how)

    def with_kl(mu: Tensor, logvar: Tensor) -> Tensor:  # both outputs in one tensor
        z, kl = fastvae.rsample_kl(mu, logvar, generator=torch.manual_seed(seed), **how)
        return torch.cat([z.flatten().to(kl.dtype), kl])

    zero = torch.zeros(shape, dtype=torch.float64)
    eps = sample(zero, zero)  # a float32 number, the same for all dtypes

    def plain(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z = mu + (logvar / 2).exp() * eps
        return z, mu.abs() + z.abs()

    def plain_with_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        both = zip(plain(mu, logvar), plain_kl(mu, logvar), strict=True)
        value, size = (torch.cat([a.flatten(), b]) for a, b in both)
        # z was rounded to its dtype before it went into this tensor
        return value, size * ROUNDING[dtype] / ROUNDING[value_dtype(dtype)]

    if draw(st.booleans()):
        compare(draw, with_kl, plain_with_kl, inputs, value_dtype(dtype))
    else:
        compare(draw, sample, plain, inputs, dtype)


HALF_LN_2PI = 0.5 * math.log(2 * math.pi)


def plain_bernoulli(x: Tensor, l: Tensor) -> Tensor:
    return x * l - F.softplus(l)


def plain_probs(x: Tensor, p: Tensor) -> Tensor:
    return x * p.log() + (1 - x) * (-p).log1p()


def plain_gaussian(x: Tensor, mean: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / 0.7) ** 2 - math.log(0.7) - HALF_LN_2PI


def plain_gaussian_logvar(x: Tensor, mean: Tensor, lv: Tensor) -> Tensor:
    return -0.5 * (lv + (x - mean) ** 2 * (-lv).exp()) - HALF_LN_2PI


class Drawn(NamedTuple):
    """A reconstruction term: inputs [x, parameters...], the likelihood made from those it holds."""

    inputs: list[Tensor]
    likelihood: Callable[[Sequence[Tensor]], Likelihood]
    given: int  # how many parameters are recon's; the others are the likelihood's own
    plain: Callable[..., Tensor]
    mask: Tensor | None

    def ours(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        recon = tensors[1 : 1 + self.given]
        family = self.likelihood(tensors[1 + self.given :])
        one = recon[0] if self.given == 1 else tuple(recon)
        return {"x": tensors[0], "recon": one, "likelihood": family, "mask": self.mask}

    def exact(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:  # [B] or [K, B], and magnitudes
        x, *params = tensors
        event = x.dim() - 1
        if self.mask is not None:  # what is left out may be NaN
            fill = [t if t.shape[t.dim() - x.dim() :] == x.shape else None for t in params]
            x = torch.where(self.mask, x, 0.5)
            filled = zip(params, fill, strict=True)
            params = [p if f is None else torch.where(self.mask, p, 0.5) for p, f in filled]
        terms = self.plain(x, *params)
        terms = terms if self.mask is None else torch.where(self.mask, terms, 0)
        return sum_event(terms, event), sum_event(terms.abs() + 1, event)


def draw_reconstruction(draw: Draw, shape: list[int], dtype: torch.dtype) -> Drawn:
    kinds = ["bernoulli", "probs", "gaussian", *["per_element"] * 4, "own_logvar"]
    kind = draw(st.sampled_from(kinds))
    samples = draw(st.sampled_from([None, None, 1, 2, 3]))
    full_shape = shape if samples is None else [samples, *shape]
    domain = {"bernoulli": (-6, 6), "probs": (0.05, 0.95)}.get(kind, (-1, 1))
    unit = kind in ("bernoulli", "probs")
    x_dtypes = [*FLOATS, torch.uint8, torch.bool]
    x = draw_tensor(draw, shape, draw(st.sampled_from(x_dtypes)), 0 if unit else -1, 1)
    params = [draw_tensor(draw, full_shape, dtype, *domain)]
    families: dict[str, Callable[[Sequence[Tensor]], Likelihood]] = {
        "bernoulli": lambda own: Bernoulli(),
        "probs": lambda own: BernoulliProbs(),
        "gaussian": lambda own: Gaussian(scale=0.7),
        "per_element": lambda own: Gaussian(logvar="per_element"),
        "own_logvar": lambda own: Gaussian(logvar=own[0]),
    }
    plain = {"bernoulli": plain_bernoulli, "probs": plain_probs, "gaussian": plain_gaussian}
    if kind == "per_element":
        per_row = [*full_shape[: len(full_shape) - len(shape) + 1], *[1] * (len(shape) - 1)]
        sizes = st.sampled_from([full_shape, per_row, per_row, draw_broadcast(draw, full_shape)])
        params.append(draw_tensor(draw, draw(sizes), dtype, -1, 1))
    elif kind == "own_logvar":
        params.append(draw_tensor(draw, draw_broadcast(draw, shape[1:]), dtype, -1, 1))
    mask = None
    if draw(st.booleans()):
        mask = draw_tensor(draw, draw_broadcast(draw, shape), torch.bool, 0, 1)
        hidden = ~mask.expand(shape)
        if draw(st.booleans()) and x.is_floating_point():  # the values left out are NaN
            x = x.masked_fill(hidden, NAN)
            params[0] = params[0].masked_fill(hidden, NAN)
    given = 1 if kind == "own_logvar" else len(params)
    formula = plain.get(kind, plain_gaussian_logvar)
    return Drawn([x, *params], families[kind], given, formula, mask)


@backends
@generated
@given(data=st.data())
def test_generated_log_likelihood(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    dtype = draw(st.sampled_from(FLOATS))
    drawn = draw_reconstruction(draw, draw_shape(draw, 1000), dtype)

    def ours(*tensors: Tensor) -> Tensor:
        return fastvae.log_likelihood(**drawn.ours(tensors), backend=backend)

    compare(draw, ours, drawn.exact, drawn.inputs, value_dtype(dtype))


@backends
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sizes", [(1, 3), (2, 1), (2, 3), (1, 1)], ids=str)
def test_logvar_constant_along_each_row_in_any_layout(
    sizes: tuple[int, int], grad: bool, backend: str
) -> None:
    """[K, B, 1]: the rows of an expanded or a transposed one have no single stride."""
    x, mean = torch.randn(3, 5).double(), torch.randn(2, 3, 5).double()
    stored = torch.randn(*reversed(sizes), 1, dtype=torch.float64).transpose(0, 1)
    stored = stored.requires_grad_(grad)
    logvar = stored.expand(2, 3, 1)
    recon = (mean, logvar)
    got = fastvae.log_likelihood(recon, x, "gaussian_logvar", backend=require(backend))
    expected = plain_gaussian_logvar(x, mean, logvar).sum(-1)
    torch.testing.assert_close(got, expected)
    if grad:
        ours, plain = (torch.autograd.grad(v.square().sum(), stored) for v in (got, expected))
        torch.testing.assert_close(ours, plain)


@backends
@generated
@given(data=st.data())
def test_generated_elbo_loss(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    dtype, latent_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    shape = draw_shape(draw, 700)
    batch = shape[0]
    drawn = draw_reconstruction(draw, shape, dtype)
    latent = [batch, *draw_shape(draw, 100)[1:]]
    plain_latent: Callable[..., tuple[Tensor, Tensor]]
    if draw(st.booleans()):
        names, plain_latent = ["kl"], plain_given_kl
        extra = [draw_tensor(draw, [batch], latent_dtype, 0, 3)]
    else:
        names, plain_latent = ["mu", "logvar"], plain_kl
        extra = [draw_tensor(draw, latent, latent_dtype, -2, 2) for _ in names]
    beta, reduction = draw(st.sampled_from([0, 0.5, 1, 4.0])), draw(st.sampled_from("msn"))
    reduction = {"m": "mean", "s": "sum", "n": "none"}[reduction]
    weight = None
    if draw(st.booleans()):
        floats = st.sampled_from([torch.float32, torch.bfloat16])
        weight = draw_tensor(draw, [batch], draw(floats), 0, 2)
    count = len(drawn.inputs)

    def ours(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, tensors[count:], strict=True))
        given |= drawn.ours(tensors[:count]) | {"sample_weight": weight, "backend": backend}
        return fastvae.elbo_loss(**given, beta=beta, reduction=reduction)

    def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(plain_latent(*tensors[count:]), drawn.exact(*tensors[:count]), strict=True)
        w = 1.0 if weight is None else weight.double()
        (kl, ll), (kl_size, ll_size) = parts
        mean = [t.mean(0) if t.dim() == 2 else t for t in (ll, ll_size)]
        loss, size = w * (beta * kl - mean[0]), w * (beta * kl_size + mean[1])
        if reduction == "none":
            return loss, size
        scale = max(batch, 1) if reduction == "mean" else 1
        return loss.sum() / scale, size.sum() / scale

    result = torch.promote_types(value_dtype(dtype), value_dtype(latent_dtype))
    compare(draw, ours, plain, [*drawn.inputs, *extra], result)
