"""Inputs changed between forward and backward, and a second backward: an error, or right."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bad import backends
from conftest import require
from torch import Tensor

import fastvae


def tensors_of_a_loss(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    randn = partial(torch.randn, dtype=torch.float64)
    made = {n: randn(4, 6).to(dtype) for n in ("mu", "logvar", "prior_mu", "prior_logvar")}
    made |= {"recon": randn(4, 5).to(dtype), "x": torch.rand(4, 5)}
    return {**made, "sample_weight": torch.rand(4), "mask": torch.rand(4, 5) > 0.3}


def masked_weighted_loss(given: dict[str, Tensor], backend: str) -> Tensor:
    rest: dict[str, Any] = {k: v for k, v in given.items() if not k.startswith("prior")}
    prior = (given["prior_mu"], given["prior_logvar"])
    return fastvae.elbo_loss(**rest, prior=prior, backend=backend, reduction="sum")


@backends
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("changed", tensors_of_a_loss(torch.float32))
def test_change_in_place_before_backward_raises_or_does_not_matter(
    changed: str, dtype: torch.dtype, create_graph: bool, backend: str
) -> None:
    require(backend)
    grads = []
    for change in (False, True):
        given = tensors_of_a_loss(dtype)
        leaves = [given[n].requires_grad_() for n in ("mu", "logvar", "recon")]
        used = {k: v * 1 if v.requires_grad else v for k, v in given.items()}
        loss = masked_weighted_loss(used, backend)
        with torch.no_grad():
            if change and changed == "mask":
                used[changed].logical_not_()
            elif change:
                used[changed].mul_(0.5)
        try:
            grads.append(torch.autograd.grad(loss, leaves, create_graph=create_graph))
        except RuntimeError as error:
            assert change and "modified by an inplace operation" in str(error)  # noqa: PT017
            return
    for before, after in zip(*grads, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_twice(dtype: torch.dtype, backend: str) -> None:
    require(backend)
    given = tensors_of_a_loss(dtype)
    leaves = [given[n].requires_grad_() for n in ("mu", "logvar", "recon")]
    z = fastvae.rsample(given["mu"], given["logvar"], backend=backend).sum()
    loss = masked_weighted_loss(given, backend) + z
    gradients = partial(torch.autograd.grad, loss, leaves)
    first = gradients(torch.tensor(2.0).to(loss), retain_graph=True)
    second = gradients(torch.tensor(2.0).to(loss), retain_graph=True)
    kept = [g.clone() for g in first]
    last = gradients(torch.tensor(1.0).to(loss))
    for f, k, s, one in zip(first, kept, second, last, strict=True):
        torch.testing.assert_close(f, s, rtol=0, atol=0)
        torch.testing.assert_close(f, k, rtol=0, atol=0)  # the last backward wrote nowhere near
        torch.testing.assert_close(f, 2 * one)
    with pytest.raises(RuntimeError, match="second time"):
        gradients()
