"""Free bits, and terms of the loss that have a graph each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import run, upstream_like
from test_latent import latents
from test_latents import kl_oracle, with_prior
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastvae
from fastvae import reference

# ---------------------------------------------------------------------------------------- free bits

FREE: dict[str, Callable[[Tensor, float], Tensor]] = {  # of [B, L], [B]
    "element": lambda kl, floor: kl.clamp(min=floor).sum(1),
    "dimension": lambda kl, floor: kl.mean(0).clamp(min=floor).sum().expand(len(kl)),
    "sample": lambda kl, floor: kl.sum(1).clamp(min=floor),
    "batch": lambda kl, floor: kl.sum(1).mean().clamp(min=floor).expand(len(kl)),
}


@pytest.mark.parametrize("per", FREE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@with_prior
def test_free_bits(per: str, reduction: str, prior: bool, quick_backend: str) -> None:
    x, logits = torch.rand(6, 5), torch.randn(6, 5)
    inputs = latents((6, 8), torch.float32)
    inputs[0][:, ::2] *= 0.01
    inputs[1][:, ::2] *= 0.01
    extra = (torch.zeros(8).double(), torch.full((8,), 0.1).double()) if prior else ()
    floor = {"element": 0.3, "dimension": 0.3, "sample": 14.0, "batch": 12.0}[per]

    def ours(m: Tensor, lv: Tensor) -> Tensor:
        given = {"free_bits": floor, "free_bits_per": per, "backend": quick_backend}
        criterion = fastvae.ELBOLoss("bernoulli", 2.0, reduction, **given)
        return criterion(logits, x, m, lv, prior=(0.0, 0.1) if prior else None)

    def oracle(m: Tensor, lv: Tensor) -> Tensor:
        kl = FREE[per](kl_oracle(m, lv, *extra), floor)
        return reference.elbo_loss(logits, x, kl=kl, beta=2.0, reduction=reduction)

    upstream = torch.tensor(1.5) if reduction == "mean" else upstream_like((6,))
    loss, grads = run(ours, inputs, upstream)
    want, want_grads = run(oracle, [t.double() for t in inputs], upstream)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    below = (kl_oracle(*(t.double() for t in inputs), *extra).mean(0) < 0.3).sum()
    assert 0 < below < 8  # both kinds
    for got, exact in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def test_free_bits_of_a_kl_that_is_given(quick_backend: str) -> None:
    x, logits, kl = torch.rand(4, 5), torch.randn(4, 5), torch.tensor([0.1, 2.0, 0.3, 4.0])
    options = {"free_bits": 1.0, "backend": quick_backend}
    for per in ("sample", "batch"):
        terms = fastvae.elbo_terms(logits, x, kl=kl, free_bits_per=per, **options)
        torch.testing.assert_close(terms.kl, FREE[per](kl[:, None], 1.0).mean())
    for per in ("dimension", "element"):
        with pytest.raises(ValueError, match=f"free_bits per {per} need mu and logvar, got kl"):
            fastvae.elbo_loss(logits, x, kl=kl, free_bits_per=per, **options)


@pytest.mark.parametrize("per", ["dimension", "element"])
def test_what_is_masked_out_has_no_free_bits(per: str, quick_backend: str) -> None:
    x, logits = torch.rand(4, 5), torch.randn(4, 5)
    mu, logvar = latents((4, 6), torch.float32)
    kept = torch.tensor([True] * 4 + [False] * 2)
    options = {"free_bits": 0.4, "free_bits_per": per, "backend": quick_backend}
    got = fastvae.elbo_loss(logits, x, mu, logvar, kl_mask=kept, **options)
    want = fastvae.elbo_loss(logits, x, mu[:, :4], logvar[:, :4], **options)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("per", FREE)
def test_free_bits_of_none_are_no_free_bits(per: str, quick_backend: str) -> None:
    """Sequences of several lengths: the mean stays that over the batch."""
    x, logits = torch.rand(5, 3), torch.randn(5, 3)
    latent = [t.requires_grad_() for t in latents((5, 4, 2), torch.float32)]
    kept = (torch.arange(4) < torch.tensor([4, 3, 2, 1, 0])[:, None])[..., None]
    losses = [
        fastvae.elbo_loss(
            logits, x, *latent, kl_mask=kept, free_bits=bits, free_bits_per=per,
            backend=quick_backend,
        )
        for bits in (0.0, 1e-30)
    ]  # fmt: skip
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, latent) for loss in losses))


def test_a_sample_that_is_masked_out_has_no_free_bits(quick_backend: str) -> None:
    x, latent = torch.zeros(4, 1), torch.zeros(4, 3)
    kept = torch.tensor([True, True, False, False])[:, None]
    for per, want in (("element", 3.0), ("sample", 1.0)):
        terms = fastvae.elbo_terms(
            x, x, latent, latent, kl_mask=kept, free_bits=1.0, free_bits_per=per,
            reduction="none", backend=quick_backend,
        )  # fmt: skip
        torch.testing.assert_close(terms.kl, want * kept[:, 0].float())


def test_free_bits_of_a_16_bit_kl(quick_backend: str) -> None:
    x, kl = torch.zeros(2, 1), torch.tensor([1.0, 2.0]).half()
    options = {"free_bits": 1e5, "free_bits_per": "sample", "backend": quick_backend}
    assert fastvae.elbo_terms(x, x, kl=kl, **options).kl == 1e5


def test_free_bits_that_change_compile_twice() -> None:
    criterion = fastvae.ELBOLoss()
    x, logits, latent = torch.rand(4, 5), torch.randn(4, 5), latents((4, 3), torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for bits in torch.linspace(0.1, 1, 6).tolist():
        criterion.free_bits = bits
        torch.testing.assert_close(compiled(logits, x, *latent), criterion(logits, x, *latent))
    assert counter.frame_count <= 2


def test_a_loss_pickled_before_there_were_free_bits() -> None:
    old = fastvae.ELBOLoss()
    del old.__dict__["free_bits"], old.__dict__["free_bits_per"]
    assert "free_bits" not in repr(old)
    loss = old(*torch.zeros(2, 2, 3), kl=torch.zeros(2))
    torch.testing.assert_close(loss, torch.tensor(3 * math.log(2)))


def test_bad_free_bits() -> None:
    for given, message in (
        ({"free_bits": -1.0}, "free_bits must be finite and ≥ 0, got -1.0"),
        ({"free_bits": math.nan}, "free_bits must be finite"),
        ({"free_bits_per": "latent"}, "free_bits_per must be one of dimension, element, sample"),
    ):
        with pytest.raises(ValueError, match=message):
            fastvae.ELBOLoss(**given)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            fastvae.elbo_loss(*torch.rand(2, 2, 3), *torch.rand(2, 2, 3), **given)  # type: ignore[misc]
    with pytest.raises(TypeError, match="free_bits must be a number, got str"):
        fastvae.ELBOLoss(free_bits="1")  # type: ignore[arg-type]


# ------------------------------------------------------------------ terms with a graph of their own


@pytest.mark.parametrize("draws", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_differentiable_terms(draws: int | None, reduction: str, quick_backend: str) -> None:
    x, weight = torch.rand(4, 5), torch.rand(4)
    logits = torch.randn(*([draws] if draws else []), 4, 5, requires_grad=True)
    latent = [t.requires_grad_() for t in latents((4, 3), torch.float32)]
    criterion = fastvae.ELBOLoss("bernoulli", 0.7, reduction, backend=quick_backend)
    given = {"sample_weight": weight}
    plain = criterion.terms(logits, x, *latent, **given)
    terms = criterion.terms(logits, x, *latent, **given, differentiable=True)
    torch.testing.assert_close(terms, plain)
    assert not plain.kl.requires_grad and not plain.log_likelihood.requires_grad

    def slopes(of: Tensor, by: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of.sum(), by, retain_graph=True)

    of_ll, of_kl = slopes(terms.log_likelihood, [logits]), slopes(terms.kl, latent)
    torch.testing.assert_close(tuple(-g for g in of_ll), slopes(plain.loss, [logits]))
    torch.testing.assert_close(tuple(0.7 * g for g in of_kl), slopes(plain.loss, latent))
    torch.testing.assert_close(
        slopes(terms.loss, [logits, *latent]), slopes(plain.loss, [logits, *latent])
    )


def test_differentiable_terms_overwrite_nothing() -> None:
    criterion = fastvae.ELBOLoss(inplace_backward=True)
    with pytest.raises(ValueError, match="either differentiable or inplace_backward"):
        criterion.terms(*torch.rand(2, 2, 3), kl=torch.ones(2), differentiable=True)
