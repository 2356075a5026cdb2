"""What a posterior does with its latents; nothing here waits for the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import functional
from fastvae._backends import Prior


class Diagnosis(NamedTuple):
    """What `diagnose` returns; tensors on mu's device."""

    kl_per_dim: Tensor
    """KL of each latent dimension, averaged over the batch, [*event], nats. Near 0: collapsed."""
    kl: Tensor
    """Their sum: the KL per sample, a scalar, nats."""
    rate_bits_per_dim: Tensor
    """The same in bits per latent dimension."""
    active: Tensor
    """Which latents are active, bool [*event]: Var over the batch of μ above the threshold."""
    active_units: Tensor
    """How many are, an int64 scalar."""
    bits_per_dim: Tensor | None
    """The loss in bits per element of x; None where loss and x were not given."""


def diagnose(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior: Prior | None = None,
    threshold: float = 0.01,
    loss: Tensor | None = None,
    x: Tensor | None = None,
    backend: str = "auto",
) -> Diagnosis:
    """KL per dimension, active units and bits per dimension of a batch, or of a whole data set.

    Active units as in Burda, Grosse & Salakhutdinov 2016, section 5.2: latent u is active where
    Var_x(E_q[u | x]) exceeds the threshold. Not differentiable.

    Args:
        mu, logvar: the encoder's output, [B, *event], B ≥ 1.
        prior: as in `fastvae.kl_divergence`.
        threshold: of the variance of μ over the batch.
        loss: the negative ELBO of these samples in nats, [] (mean) or [B], with β = 1.
        x: the data, [B, *event_of_x]; its size per sample is what the loss is divided by.
        backend: "auto", "cpp", "triton" or "eager".

    Raises:
        ValueError, TypeError: as `fastvae.kl_divergence`; an empty batch; one of loss and x
            without the other.
    """
    mu, logvar = functional.check_latent(mu, logvar)
    if mu.shape[0] == 0:
        raise ValueError(f"mu must hold at least one sample, got {list(mu.shape)}")
    if (loss is None) != (x is None):
        raise ValueError(f"give loss and x together, got {'x' if loss is None else 'loss'} alone")
    with torch.no_grad():

        def by_dim(t: Tensor) -> Tensor:  # the kernel sums along rows: here over the batch
            return t.reshape(mu.shape[0], -1).T

        turned = None
        if prior is not None:
            prior_mu, prior_logvar = functional.expand_prior(prior, mu)
            turned = (by_dim(prior_mu), by_dim(prior_logvar))
        sums = functional.kl_divergence(by_dim(mu), by_dim(logvar), prior=turned, backend=backend)
        kl_per_dim = (sums / mu.shape[0]).view(mu.shape[1:])
        kl = kl_per_dim.sum()
        active = mu.to(kl.dtype).var(0, correction=0) > threshold
        bits_per_dim = None
        if loss is not None and x is not None:
            bits_per_dim = loss.mean() / (math.log(2) * max(x[0].numel(), 1))
        return Diagnosis(
            kl_per_dim=kl_per_dim,
            kl=kl,
            rate_bits_per_dim=kl / (math.log(2) * max(kl_per_dim.numel(), 1)),
            active=active,
            active_units=active.sum(),
            bits_per_dim=bits_per_dim,
        )


class NonFinite:
    """Counts rows that are not finite, on the device; read when asked.

    For each term: how many rows, and the call and row of the first.
    """

    terms = ("log_likelihood", "kl", "sample_weight")

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros(len(self.terms), dtype=torch.int64, device=device)
        self.first = torch.full((len(self.terms), 2), -1, device=device)
        self.calls = torch.zeros((), dtype=torch.int64, device=device)
        self.rows = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, *terms: Tensor | None) -> None:
        """One call's terms, in the order of `terms`: [B] or [K, B], None where not given."""
        if terms[0] is None or terms[0].shape[-1] == 0:
            return
        for i, term in enumerate(terms):
            if term is None:
                continue
            bad = ~term.detach().isfinite()
            bad = bad.any(0) if bad.dim() == 2 else bad
            row = bad.to(torch.uint8).argmax()  # of equals, the first
            new = bad.any() & (self.first[i, 0] < 0)
            self.first[i] = torch.where(new, torch.stack((self.calls, row)), self.first[i])
            self.count[i] += bad.sum()
        self.calls += 1
        self.rows += terms[0].shape[-1]

    def report(self) -> str | None:
        """What was not finite, in words; None if all was. Waits for the device."""
        count, first = self.count.tolist(), self.first.tolist()
        found = [
            f"{name} in {n} of {int(self.rows)} rows, first in call {call}, row {row}"
            for name, n, (call, row) in zip(self.terms, count, first, strict=True)
            if n
        ]
        return "; ".join(found) or None
