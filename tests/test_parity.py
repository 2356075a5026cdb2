"""The loss functions people come from: docs/coming-from.md, value and every gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_good_as_torch, run
from torch import Tensor

from fastvae import ELBOLoss
from fastvae.likelihoods import Gaussian


def check_parity(ours: Any, usual: Any, inputs: list[Tensor]) -> None:
    """The same loss and the same gradient of every input as the usual code, in float32 and to
    rounding in float64: a dropped constant or another average would be far outside."""
    for dtype in (torch.float32, torch.float64):
        given = [t.to(dtype) for t in inputs]
        value, grads = run(ours, given)
        torch_value, torch_grads = run(usual, given)
        oracle_value, oracle_grads = run(usual, [t.to(dtype).double() for t in inputs])
        assert_as_good_as_torch(value, torch_value, oracle_value, what="loss")
        for i, (grad, torchs, oracle) in enumerate(
            zip(grads, torch_grads, oracle_grads, strict=True)
        ):
            assert_as_good_as_torch(grad, torchs, oracle, what=f"gradient {i}")


def mnist_like() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x as images, what the decoder gives as rows, mu and logvar."""
    x = (torch.rand(128, 1, 28, 28) * 255).round() / 255
    return x, torch.randn(128, 784), torch.randn(128, 20), 0.5 * torch.randn(128, 20)


def test_parity_pytorch_example(backend: str) -> None:
    """pytorch/examples: the decoder ends in a sigmoid, everything is summed."""
    x, logits, mu, logvar = mnist_like()
    criterion = ELBOLoss("bernoulli_probs", reduction="sum", backend=backend)

    def usual(recon: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        target = x.to(recon.dtype).view(-1, 784)
        bce = F.binary_cross_entropy(recon, target, reduction="sum")
        return bce + -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    def ours(recon: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        loss: Tensor = criterion(recon, x.to(recon.dtype).view(-1, 784), mu, logvar)
        return loss

    check_parity(ours, usual, [logits.sigmoid(), mu, logvar])


def test_parity_logits(backend: str) -> None:
    """Binary cross-entropy with logits, summed, over the batch size."""
    x, logits, mu, logvar = mnist_like()
    criterion = ELBOLoss(backend=backend)

    def usual(logits: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        target = x.to(logits.dtype).view(-1, 784)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (bce + kl) / len(x)

    def ours(logits: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        loss: Tensor = criterion(logits, x.to(logits.dtype).view(-1, 784), mu, logvar)
        return loss

    check_parity(ours, usual, [logits, mu, logvar])


def test_parity_half_squared_error(backend: str) -> None:
    """Half the squared error plus the KL, averaged over the batch."""
    x, recon, mu, logvar = mnist_like()
    criterion = ELBOLoss(Gaussian(normalized=False), backend=backend)

    def usual(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        error = 0.5 * ((x - recon) ** 2).sum((1, 2, 3))
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
        return (error + kl).mean()

    check_parity(criterion, usual, [recon.view_as(x), x, mu, logvar])


@pytest.mark.parametrize("latent_mean", [False, True])
def test_parity_per_pixel_mean_squared_error(latent_mean: bool, backend: str) -> None:
    """mse_loss(recon, x) + w KL: half the pixels are hidden in front of the KL."""
    x, recon, mu, logvar = mnist_like()
    w, pixels, latents = 0.01, 784, 20
    beta = w * pixels / 2 / (latents if latent_mean else 1)
    criterion = ELBOLoss(Gaussian(normalized=False), beta=beta, backend=backend)

    def usual(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp())
        return F.mse_loss(recon, x) + w * (kl.mean() if latent_mean else kl.sum(1).mean())

    def ours(*inputs: Tensor) -> Tensor:
        loss: Tensor = criterion(*inputs) * 2 / pixels
        return loss

    check_parity(ours, usual, [recon.view_as(x), x, mu, logvar])


def test_parity_per_pixel_mean_logits(backend: str) -> None:
    x, logits, mu, logvar = mnist_like()
    w, pixels = 0.01, 784
    criterion = ELBOLoss(beta=w * pixels, backend=backend)

    def usual(logits: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
        target = x.to(logits.dtype).view(-1, 784)
        return F.binary_cross_entropy_with_logits(logits, target) + w * kl.mean()

    def ours(logits: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        loss: Tensor = criterion(logits, x.to(logits.dtype).view(-1, 784), mu, logvar) / pixels
        return loss

    check_parity(ours, usual, [logits, mu, logvar])
