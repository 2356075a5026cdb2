"""The latent as a torch.distributions.Distribution, and from one; the maths is functional.py's."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, register_kl

from fastvae import functional
from fastvae._composite import compute_dtype
from fastvae._latents import (
    HasLogvar,
    beside,
    check_one_batch_dim,
    latent,
    of_distribution,
    of_posterior,
)
from fastvae._validation import check_batch_dims


class DiagonalNormal(Distribution):
    """N(μ, diag(e^logvar)): a batch of latents for torch.distributions, by the fused kernels.

    Dimension 0 is the batch, all others are the event, unless ``batch_dims`` says otherwise.
    ``torch.distributions.kl_divergence`` of it and another `DiagonalNormal`, a ``Normal`` or an
    ``Independent`` of one is `fastvae.kl_divergence`, [B] in nats.

    Args:
        mu: mean, [B, *event], floating; of several batch dimensions [*batch, *event].
        logvar: ln σ², the same shape, dtype and device.
        std, log_std: σ, above 0 (checked on CPU), or ln σ, in place of logvar; a 16-bit std makes
            a distribution of float32.
        batch_dims: how many leading dimensions are the batch: 2 for [B, T, L], 0 for one variable.
        validate_args: whether values are checked as well (NaN, values outside the support). Off
            unless asked for: it reads the tensors, which stalls a GPU.

    Raises:
        ValueError, TypeError: as `fastvae.rsample`.

    Examples:
        >>> q = DiagonalNormal(mu, logvar)
        >>> z = q.rsample()
        >>> kl = torch.distributions.kl_divergence(q, Normal(0.0, 1.0))
    """

    arg_constraints = {"mu": constraints.real, "logvar": constraints.real}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        validate_args: bool | None = None,
        *,
        std: Tensor | None = None,
        log_std: Tensor | None = None,
        batch_dims: int = 1,
    ) -> None:
        self.mu, self.logvar, _ = latent(mu, logvar, std, log_std)
        check_batch_dims(self.mu, batch_dims)
        shape = self.mu.shape
        super().__init__(shape[:batch_dims], shape[batch_dims:], validate_args=bool(validate_args))

    @property
    def support(self) -> Any:  # torch's own distributions type it so
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def mode(self) -> Tensor:
        return self.mu

    @property
    def stddev(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp()

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> DiagonalNormal:
        """A view for a batch of another size, or of more dimensions."""
        shape = (*batch_shape, *self.event_shape)
        return type(self)(
            self.mu.expand(shape), self.logvar.expand(shape), self._validate_args,
            batch_dims=len(batch_shape),
        )  # fmt: skip

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:  # type: ignore[override]
        """Draws z, [*sample_shape, B, *event], differentiable; as `fastvae.rsample`."""
        if len(sample_shape) == 0:
            return functional.rsample(self.mu, self.logvar)
        count = math.prod(sample_shape)
        if count == 0:
            return self.mu.new_empty(*sample_shape, *self.mu.shape)
        z = functional.rsample(self.mu, self.logvar, num_samples=count)
        return z.view(*sample_shape, *self.mu.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln q(value) in nats, differentiable in value, mu and logvar.

        Args:
            value: [*sample_shape, B, *event]; its batch and this one's broadcast.

        Returns:
            [*sample_shape, B].

        Raises:
            ValueError, TypeError: as `fastvae.log_likelihood`.
        """
        if self._validate_args:
            self._validate_sample(value)
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"value must be floating, got {value.dtype}")
        event = self.event_shape
        lead = value.dim() - len(event)
        batch, own = value.shape[:lead], self.batch_shape
        fits = lead >= 0 and value.shape[lead:] == event
        pairs = zip(reversed(batch), reversed(own), strict=False)
        if not fits or any(n != m and 1 not in (n, m) for n, m in pairs):
            raise ValueError(
                f"value must have shape [*sample_shape, {', '.join(map(str, self.mu.shape))}], "
                f"got {list(value.shape)}"
            )
        batch = torch.broadcast_shapes(batch, own)
        if 0 in batch:
            return self.mu.new_empty(batch, dtype=compute_dtype(self.mu.dtype))
        # (z − μ)² does not care which of the two is the data; the parameter may have a dimension
        # of draws that the data has not.
        of_q = batch[len(batch) - len(own) :]
        q = self if of_q == own else self.expand(of_q)
        rows = (of_q.numel(), *event)
        count = batch[: len(batch) - len(own)].numel()
        draws = value.expand((*batch, *event)).reshape(count, *rows)
        mu, logvar = q.mu.reshape(rows), q.logvar.reshape(rows)
        ln_q = functional.log_likelihood((draws, logvar), mu, "gaussian_logvar")
        return ln_q.view(batch)

    def entropy(self) -> Tensor:
        """½ Σ (1 + ln 2π + logvar), [B] in nats."""
        logvar = self.logvar.to(compute_dtype(self.logvar.dtype))
        per_dim = 0.5 * (1 + math.log(2 * math.pi) + logvar)
        return per_dim.reshape(*self.batch_shape, self.event_shape.numel()).sum(-1)


def from_distribution(q: Distribution | HasLogvar) -> DiagonalNormal:
    """A diagonal normal of another library as `DiagonalNormal`; gradients flow to its parameters.

    Args:
        q: a ``torch.distributions.Normal`` (dimension 0 is taken as the batch, all others as the
            event), an ``Independent`` of one with one batch dimension left, a `DiagonalNormal`, or
            any object with tensors ``mean`` and ``logvar`` (diffusers'
            ``DiagonalGaussianDistribution``).

    Returns:
        the same distribution, with mu and logvar as `fastvae.rsample_kl` takes them.

    Raises:
        TypeError: q is none of these.
        ValueError: q has no batch dimension, or an ``Independent`` more than one; a deterministic
            one of diffusers'.
    """
    if isinstance(q, DiagonalNormal):
        return q
    if (found := of_posterior(q)) is not None:
        check_one_batch_dim(q)
        return DiagonalNormal(*found)
    inside = f" of {type(q.base_dist).__name__}" if isinstance(q, Independent) else ""
    raise TypeError(
        "q must be a Normal, an Independent of one, or have tensors mean and logvar, got "
        f"{type(q).__name__}{inside}"
    )


def _parameters(
    d: DiagonalNormal | Normal | Independent[Any], like: DiagonalNormal
) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of a distribution whose event is `like`'s."""
    if not isinstance(d, Normal) and d.event_shape != like.event_shape:
        raise ValueError(
            f"q and p must have the same event_shape, got {list(d.event_shape)} and "
            f"{list(like.event_shape)}"
        )
    if (found := of_distribution(d)) is None:
        inner = type(d.base_dist if isinstance(d, Independent) else d).__name__
        raise NotImplementedError(f"no KL of an Independent of {inner} is registered")
    return beside(found[0], like.mu), beside(found[1], like.mu)


def _kl(
    q: DiagonalNormal | Normal | Independent[Any], p: DiagonalNormal | Normal | Independent[Any]
) -> Tensor:
    like = q if isinstance(q, DiagonalNormal) else p
    assert isinstance(like, DiagonalNormal)
    # A number takes the others' dtype, a tensor of a wider one makes them wider.
    every = (*_parameters(q, like), *_parameters(p, like))
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in every if t.dim() > 0})
    mu, logvar, *prior = (t.to(dtype) for t in every)
    shape = torch.broadcast_shapes(*(t.shape for t in every))
    return functional.kl_divergence(
        mu.expand(shape),
        logvar.expand(shape),
        prior=(prior[0], prior[1]),
        batch_dims=len(shape) - len(like.event_shape),
    )


for _other in (DiagonalNormal, Normal, Independent):
    register_kl(DiagonalNormal, _other)(_kl)
    if _other is not DiagonalNormal:
        register_kl(_other, DiagonalNormal)(_kl)
