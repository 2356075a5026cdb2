"""What a posterior does with its latents, and rows that are not finite."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import functional
from fastvae._backends import select
from fastvae._latents import AnyPrior, Posterior, check_one_batch_dim, latent


class Diagnosis(NamedTuple):
    """What `diagnose` returns; tensors on mu's device.

    Attributes:
        kl_per_dim: KL of each latent, averaged over the batch, [*event], nats. Near 0: collapsed.
        kl: their sum, [], nats per sample.
        kl_bits_per_latent: the same over L ln 2, [], bits per latent element.
        active: which latents are active, bool, [*event].
        active_units: how many are, [], int64.
        bits_per_dim: loss / (D ln 2), [], bits per element of x; None without loss and x.
    """

    kl_per_dim: Tensor
    kl: Tensor
    kl_bits_per_latent: Tensor
    active: Tensor
    active_units: Tensor
    bits_per_dim: Tensor | None


def diagnose(
    mu: Posterior,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    prior: AnyPrior | None = None,
    threshold: float = 0.01,
    loss: Tensor | None = None,
    x: Tensor | None = None,
    backend: str = "auto",
) -> Diagnosis:
    """KL per dimension, active units and bits per dimension of a batch, or of a whole data set.

    Active units as in Burda, Grosse & Salakhutdinov 2016, section 5.2: latent u is active where
    Var_x(E_q[u | x]) exceeds the threshold. Not differentiable. Nothing waits for the device.

    Args:
        mu, logvar, std, log_std: the encoder's output, [B, *event], B ≥ 1, as `fastvae.rsample`
            takes it.
        prior: as in `fastvae.kl_divergence`.
        threshold: of the variance of μ over the batch (divided by B).
        loss: the negative ELBO of these samples in nats, [] (mean) or [B], with β = 1.
        x: the data, [B, *event_of_x]; D, its size per sample, is what the loss is divided by.
        backend: "auto", "cpp", "cuda", "triton" or "eager".

    Raises:
        ValueError, TypeError: as `fastvae.kl_divergence`; an empty batch; one of loss and x
            without the other, or of another shape.
    """
    with torch.no_grad():
        check_one_batch_dim(mu)
        mu, logvar, _ = latent(mu, logvar, std, log_std)
        if mu.shape[0] == 0:
            raise ValueError(f"mu must hold at least one sample, got {list(mu.shape)}")
        if (loss is None) != (x is None):
            given = "x" if loss is None else "loss"
            raise ValueError(f"give loss and x together, got {given} alone")
        kl_per_dim = functional.kl_divergence(
            mu, logvar, prior=prior, per="dimension", backend=backend
        )
        kl = kl_per_dim.sum()
        active = mu.to(kl.dtype).var(0, correction=0) > threshold
        return Diagnosis(
            kl_per_dim=kl_per_dim,
            kl=kl,
            kl_bits_per_latent=kl / (math.log(2) * max(kl_per_dim.numel(), 1)),
            active=active,
            active_units=active.sum(),
            bits_per_dim=None if loss is None or x is None else _bits(loss, x, mu),
        )


def _bits(loss: Tensor, x: Tensor, mu: Tensor) -> Tensor:
    for name, t in (("loss", loss), ("x", x)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not loss.is_floating_point():
        raise TypeError(f"loss must be floating, got {loss.dtype}")
    if loss.shape not in ((), mu.shape[:1]):
        raise ValueError(f"loss must have shape [] or [{mu.shape[0]}], got {list(loss.shape)}")
    if x.shape[:1] != mu.shape[:1]:
        raise ValueError(f"x must have mu's batch size {mu.shape[0]}, got {list(x.shape)}")
    return loss.mean() / (math.log(2) * max(x.shape[1:].numel(), 1))


class NonFinite:
    """Counts rows that are not finite, on the device; `report` reads them."""

    terms = ("log_likelihood", "kl", "sample_weight")

    def __init__(self, device: torch.device) -> None:
        # One born in inference mode could not be written by a later training step.
        outside = not torch.compiler.is_compiling()
        with torch.inference_mode(False) if outside else contextlib.nullcontext():
            # Of each term, [5, 3]: bad rows, call and row of the first, calls and rows so far.
            self.state = torch.zeros(5, len(self.terms), dtype=torch.int64, device=device)

    def add(self, rows: Tensor, kl: Tensor, weight: Tensor | None, backend: str) -> None:
        """One call's terms: ln p [B] or [K, B], the KL [B], and the weights [B]."""
        select(backend, rows.device).count_nonfinite(self.state, rows, kl, weight)

    def report(self) -> list[str]:
        """What was not finite since the last report, in words. Waits for the device."""
        state = self.state.T.tolist()
        self.state.zero_()  # in place: a captured CUDA graph goes on writing here
        return [
            f"{name} in {count} of {total} rows, first in call {call}, row {row}"
            for name, (count, call, row, _, total) in zip(self.terms, state, strict=True)
            if count
        ]
