"""Generated mistakes in shape, dtype and value: a clear error, or the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bad import EITHER, backends
from conftest import require
from hypothesis import given
from hypothesis import strategies as st
from test_properties import (
    FLOATS,
    SIZES,
    Draw,
    draw_broadcast,
    draw_shape,
    generated,
    plain_bernoulli,
    plain_kl,
    sum_event,
)
from torch import Tensor

import fastvae


def draw_mistake(draw: Draw, shape: Sequence[int]) -> list[int]:
    """This shape four times in five, else one that is near it."""
    kind = draw(st.sampled_from(["same"] * 8 + ["head", "tail", "more", "one", "other", "none"]))
    shape = list(shape)
    if kind == "same" or (kind != "none" and not shape):
        return shape
    at = draw(st.integers(0, len(shape) - 1)) if shape else 0
    mistakes: dict[str, list[int]] = {
        "head": shape[1:],
        "tail": shape[:-1],
        "more": [*shape[:at], draw(SIZES), *shape[at:]],
        "one": [*shape[:at], 1, *shape[at + 1 :]],
        "other": [*shape[:at], draw(SIZES), *shape[at + 1 :]],
        "none": [],
    }
    return mistakes[kind]


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


def answer_or_error(valid: bool, call: Callable[[], Tensor], exact: Callable[[], Tensor]) -> None:
    try:
        got = call()
    except EITHER as error:
        assert not valid, f"a good call was refused: {error}"  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert valid, f"a bad call was accepted; it gave {got.dtype} {list(got.shape)}"
        torch.testing.assert_close(got.double(), exact().double(), rtol=1e-4, atol=1e-3)


def draw_plain(draw: Draw, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    wrong = [torch.int64, torch.int16, torch.complex64, torch.bool, torch.uint8]
    dtype = draw(st.sampled_from([dtypes[0]] * 12 + [*dtypes, *wrong]))
    return torch.rand(shape, dtype=torch.float64).to(dtype)


@backends
@generated
@given(data=st.data())
def test_generated_mistakes_in_latents(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape = draw_shape(draw, 300)
    tensors = [draw_plain(draw, draw_mistake(draw, shape), FLOATS[1:2]) for _ in range(2)]
    prior: Any = None
    valid = tensors[0].shape == tensors[1].shape and tensors[0].dim() > 0
    if draw(st.booleans()):
        sizes = [draw_mistake(draw, draw_broadcast(draw, shape)) for _ in range(2)]
        prior = tuple(draw_plain(draw, s, FLOATS[1:2]) for s in sizes)
        valid = valid and all(broadcasts(p.shape, tensors[0].shape) for p in prior)
    everything = [*tensors, *(prior or ())]
    valid = valid and all(t.dtype == torch.float32 for t in everything)

    answer_or_error(
        valid,
        lambda: fastvae.kl_divergence(*tensors, prior=prior, backend=backend),
        lambda: plain_kl(*(t.double() for t in everything))[0],
    )


@backends
@generated
@given(data=st.data())
def test_generated_mistakes_in_a_loss(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape = draw_shape(draw, 300)
    x = draw_plain(draw, draw_mistake(draw, shape), [torch.float32, torch.uint8, torch.bool])
    lead = draw(st.sampled_from([[], [], [1], [3], [0]]))
    logits = draw_plain(draw, [*lead, *draw_mistake(draw, shape)], FLOATS[1:])
    kl = draw_plain(draw, draw_mistake(draw, shape[:1]), FLOATS[1:])
    mask = weight = None
    if draw(st.booleans()):
        mask_shape = draw_mistake(draw, draw_broadcast(draw, shape))
        mask = torch.rand(mask_shape) > 0.5 if draw(st.integers(0, 9)) else torch.rand(mask_shape)
    if draw(st.booleans()):
        weight = draw_plain(draw, draw_mistake(draw, shape[:1]), FLOATS[1:])
    same = logits.shape == x.shape
    with_samples = logits.dim() == x.dim() + 1 and logits.shape[1:] == x.shape
    valid = x.dim() > 0 and (same or (with_samples and logits.shape[0] > 0))
    valid = valid and x.dtype in (*FLOATS, torch.uint8, torch.bool)
    per_sample = [t for t in (kl, weight) if t is not None]
    valid = valid and all(t.dtype in FLOATS for t in (logits, *per_sample))
    valid = valid and all(t.shape == x.shape[:1] for t in per_sample)
    if mask is not None:
        valid = valid and mask.dtype == torch.bool and broadcasts(mask.shape, x.shape)

    def exact() -> Tensor:
        terms = plain_bernoulli(x.double(), logits.double())
        terms = terms if mask is None else torch.where(mask, terms, 0)
        ll = sum_event(terms, x.dim() - 1)
        loss = kl.double() - (ll.mean(0) if ll.dim() == 2 else ll)
        return loss if weight is None else loss * weight.double()

    given: dict[str, Any] = {"kl": kl, "mask": mask, "sample_weight": weight, "reduction": "none"}
    answer_or_error(valid, lambda: fastvae.elbo_loss(logits, x, **given, backend=backend), exact)
