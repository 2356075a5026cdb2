"""The latent as a torch.distributions.Distribution, and from one; the maths is functional.py's."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, register_kl

from fastvae import functional


class DiagonalNormal(Distribution):
    """N(μ, diag(e^logvar)): a batch of latents for torch.distributions, by the fused kernels.

    Dimension 0 is the batch, all others are the event. ``torch.distributions.kl_divergence`` of it
    and another `DiagonalNormal`, a ``Normal`` or an ``Independent`` of one is
    `fastvae.kl_divergence`, [B] in nats.

    Args:
        mu: mean, [B, *event], floating.
        logvar: ln σ², the same shape, dtype and device.
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

    def __init__(self, mu: Tensor, logvar: Tensor, validate_args: bool | None = None) -> None:
        self.mu, self.logvar = functional.check_latent(mu, logvar)
        mu = self.mu
        super().__init__(mu.shape[:1], mu.shape[1:], validate_args=bool(validate_args))

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
        """A view for a batch of another size; from a batch of one.

        Raises:
            ValueError: batch_shape has not one dimension.
        """
        if len(batch_shape) != 1:
            raise ValueError(f"batch_shape must have one dimension, got {list(batch_shape)}")
        shape = (*batch_shape, *self.event_shape)
        return type(self)(self.mu.expand(shape), self.logvar.expand(shape), self._validate_args)

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
            value: [*sample_shape, B, *event].

        Returns:
            [*sample_shape, B].

        Raises:
            ValueError, TypeError: as `fastvae.log_likelihood`.
        """
        if self._validate_args:
            self._validate_sample(value)
        event = len(self.event_shape)
        if not isinstance(value, Tensor) or value.shape[-event - 1 :] != self.mu.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"value must have shape [*sample_shape, {', '.join(map(str, self.mu.shape))}], "
                f"got {got}"
            )
        # (z − μ)² does not care which of the two is the data; the parameter may have a dimension
        # of draws that the data has not.
        draws = value if value.shape == self.mu.shape else value.reshape(-1, *self.mu.shape)
        ln_q = functional.log_likelihood(self.mu, (draws, self.logvar), "gaussian_logvar")
        return ln_q.view(value.shape[: value.dim() - event])

    def entropy(self) -> Tensor:
        """½ Σ (1 + ln 2π + logvar), [B] in nats."""
        per_dim = 0.5 * (1 + math.log(2 * math.pi) + self.logvar)
        return per_dim.flatten(1).sum(1) if per_dim.dim() > 1 else per_dim


@runtime_checkable
class _Posterior(Protocol):
    """What diffusers' DiagonalGaussianDistribution has, among others."""

    mean: Tensor
    logvar: Tensor


def from_distribution(q: Distribution | _Posterior) -> DiagonalNormal:
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
        ValueError: q has no batch dimension, or an ``Independent`` more than one.
    """
    if isinstance(q, DiagonalNormal):
        return q
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        if len(q.batch_shape) != 1:
            raise ValueError(
                "q must have one batch dimension, the rest reinterpreted as the event, got "
                f"batch_shape {list(q.batch_shape)} and event_shape {list(q.event_shape)}"
            )
        q = q.base_dist
    if isinstance(q, Normal):
        return DiagonalNormal(q.loc, 2 * q.scale.log())
    if isinstance(q, _Posterior) and not isinstance(q, type):
        return DiagonalNormal(q.mean, q.logvar)
    inside = f" of {type(q.base_dist).__name__}" if isinstance(q, Independent) else ""
    raise TypeError(
        "q must be a Normal, an Independent of one, or have tensors mean and logvar, got "
        f"{type(q).__name__}{inside}"
    )


def _prior(p: Normal | Independent[Any], q: DiagonalNormal) -> tuple[Tensor, Tensor]:
    if isinstance(p, Independent):
        if not isinstance(p.base_dist, Normal):
            raise NotImplementedError(f"no KL of {q} and an Independent of {p.base_dist}")
        if p.event_shape != q.event_shape:
            raise ValueError(
                f"q and p must have the same event_shape, got {list(q.event_shape)} and "
                f"{list(p.event_shape)}"
            )
        p = p.base_dist
    return p.loc.to(q.mu), 2 * p.scale.to(q.mu).log()


@register_kl(DiagonalNormal, DiagonalNormal)
def _kl_diagonal_diagonal(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"q and p must have the same event_shape, got {list(q.event_shape)} and "
            f"{list(p.event_shape)}"
        )
    return functional.kl_divergence(q.mu, q.logvar, prior=(p.mu, p.logvar))


@register_kl(DiagonalNormal, Normal)
@register_kl(DiagonalNormal, Independent)
def _kl_diagonal_normal(q: DiagonalNormal, p: Normal | Independent[Any]) -> Tensor:
    return functional.kl_divergence(q.mu, q.logvar, prior=_prior(p, q))


@register_kl(Normal, DiagonalNormal)
@register_kl(Independent, DiagonalNormal)
def _kl_normal_diagonal(q: Normal | Independent[Any], p: DiagonalNormal) -> Tensor:
    try:
        known = from_distribution(q)
    except TypeError as error:
        raise NotImplementedError(f"no KL of {q} and {p}") from error
    return _kl_diagonal_diagonal(known, p)
