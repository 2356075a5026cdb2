"""Autocast: half-precision decoders under a float32 loss, without a copy of what they give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import reference

HALVES = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d).removeprefix("torch."))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with torch.device(request.param):
        yield request.param


class Copies(TorchDispatchMode):
    """Records what is converted or copied, from a size on. (Its presence alone makes the backward
    multiply by an op of torch's, which is none of these.)"""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        copies = name in ("aten::_to_copy", "aten::copy_", "aten::clone")
        if copies and out.numel() >= self.least:
            self.found.append((name, out.dtype))
        return out


def model(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    return nn.Linear(64, 16), nn.Linear(8, 64), torch.rand(32, 64)


@halves
def test_a_training_step(device: str, dtype: torch.dtype) -> None:
    """Outputs in half precision, the loss in float32, gradients near those of a float32 step."""
    encoder, decoder, x = model(device, dtype)
    criterion = fastvae.ELBOLoss("bernoulli")
    grads = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast(device, dtype, enabled=enabled):
            mu, logvar = encoder(x).chunk(2, dim=1)
            z, kl = fastvae.rsample_kl(mu, logvar)
            recon = decoder(z)
            loss = criterion(recon, x, kl=kl)
        assert mu.dtype == z.dtype == recon.dtype == (dtype if enabled else torch.float32)
        assert loss.dtype == kl.dtype == torch.float32
        parameters = [*encoder.parameters(), *decoder.parameters()]
        grads.append(torch.autograd.grad(loss, parameters))
    for full, half in zip(*grads, strict=True):
        assert (half - full).norm() <= 0.03 * full.norm()


@halves
def test_nothing_of_the_reconstructions_size_is_converted(dtype: torch.dtype) -> None:
    recon = torch.randn(32, 640, dtype=dtype).requires_grad_()
    x = torch.rand(32, 640)
    with torch.autocast("cpu", dtype), Copies(recon.numel()) as ours:
        fastvae.elbo_loss(recon, x, kl=torch.ones(32)).backward()
    assert not ours.found
    with torch.autocast("cpu", dtype), Copies(recon.numel()) as torchs:
        F.binary_cross_entropy_with_logits(recon, x, reduction="sum").backward()
    assert ("aten::_to_copy", torch.float32) in torchs.found, "the test sees such a copy"


@halves
def test_probability_targets_are_allowed(device: str, dtype: torch.dtype) -> None:
    """torch refuses binary_cross_entropy under autocast; here it is computed in float32."""
    p, x = torch.rand(4, 9).to(dtype).requires_grad_(), torch.rand(4, 9)
    with torch.autocast(device, dtype):
        if device == "cuda":
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                F.binary_cross_entropy(p, x.to(dtype))
        got = fastvae.log_likelihood(p, x, "bernoulli_probs")
    want = -F.binary_cross_entropy(p.double(), x.double(), reduction="none").sum(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(got.sum(), p)
    assert grad.dtype == dtype and grad.isfinite().all()


def test_a_wide_posterior_in_float16(device: str) -> None:
    """e^12 is beyond float16's 65504; its root, which scales z, is not."""
    mu = torch.zeros(5, 8, dtype=torch.float16).requires_grad_()
    logvar = torch.full((5, 8), 12.0, dtype=torch.float16).requires_grad_()
    with torch.autocast(device, torch.float16):
        z, kl = fastvae.rsample_kl(mu, logvar)
        (z.float().square().mean() + kl.sum() * 1e-6).backward()
    assert z.isfinite().all() and kl.isfinite().all()
    want = reference.kl_divergence(mu.detach().double(), logvar.detach().double())
    torch.testing.assert_close(kl.double(), want, rtol=1e-6, atol=0)
    assert mu.grad.isfinite().all() and logvar.grad.isfinite().all()


@halves
def test_mixed_dtypes_take_the_wider(device: str, dtype: torch.dtype) -> None:
    """Autocast gives some outputs in float32 beside others in half precision: softplus and exp on
    CUDA; a learned prior is a float32 parameter anyway."""
    mu, logvar = torch.randn(6, 5).to(dtype).requires_grad_(), torch.randn(6, 5).requires_grad_()
    prior = (torch.randn(5).requires_grad_(), torch.zeros(()))
    wide = mu.detach().float()
    with pytest.raises(TypeError, match="same dtype"):
        fastvae.rsample(mu, logvar)
    with pytest.raises(TypeError, match="prior mu must have mu's dtype"):
        fastvae.kl_divergence(mu, mu, prior=prior)
    with torch.autocast(device, dtype):
        z, kl = fastvae.rsample_kl(mu, logvar, seed=1)
        assert z.dtype == torch.float32
        assert torch.equal(z, fastvae.rsample(wide, logvar, seed=1))
        draws = []  # one seed for each, however many ways were tried
        for first in (mu, wide):
            torch.manual_seed(2)
            draws.append(fastvae.rsample(first, logvar))
        assert torch.equal(*draws)
        torch.testing.assert_close(kl, fastvae.kl_divergence(wide, logvar))
        with_prior = fastvae.kl_divergence(mu, logvar.to(dtype), prior=prior)
        torch.testing.assert_close(
            with_prior, fastvae.kl_divergence(wide, logvar.to(dtype).float(), prior=prior)
        )
        loss = fastvae.elbo_loss(torch.zeros(6, 3), torch.rand(6, 3), mu, logvar, prior=prior)
        q = fastvae.DiagonalNormal(mu, logvar)
        assert q.mu.dtype == torch.float32
    grads = torch.autograd.grad(loss, [mu, logvar, prior[0]])
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
