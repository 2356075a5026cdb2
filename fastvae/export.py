"""Our operators in torch's own, for programs that leave torch: ``torch.export``, ONNX."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import _composite
from fastvae._backends import cpp, eager

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What each operator of a forward pass is in torch's, for ``run_decompositions``.

    Values are the eager backend's. Noise is torch's own, ``randn``: other runtimes have no use for
    the seed, and draw their own in its place.

    Returns:
        operators to functions; empty without the C++ extension, whose operators they are.

    Examples:
        >>> table = torch.export.default_decompositions()
        >>> table.update(fastvae.export.decompositions())
        >>> program = torch.export.export(model, (x,)).run_decompositions(table)
        >>> torch.onnx.export(program, (), "model.onnx")
    """
    if not cpp.status().available:
        return {}
    from fastvae._ops import rsample_composite

    ops = torch.ops.fastvae
    return {
        ops.seed.default: _seed,
        ops.noise.default: _noise,
        ops.rsample.default: rsample_composite,  # which draws `noise`
        ops.rsample_kl.default: _rsample_kl,
        ops.kl_divergence.default: _kl_divergence,
        ops.log_likelihood.default: _log_likelihood,
        ops.elbo.default: _elbo,
        ops.row_forward.default: _row_forward,
        ops.elbo_reduce.default: eager.combined,
        ops.row_composite.default: _composite.rows,
    }


def _seed(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=like.device)  # nobody reads it


def _noise(
    seed: Tensor,
    size: Sequence[int],
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None = None,
) -> Tensor:
    return torch.randn(num_samples, *size, device=seed.device)


def _rsample_kl(mu: Tensor, logvar: Tensor, seed: Tensor, *stream: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.fastvae.rsample(mu, logvar, seed, *stream), _kl_divergence(mu, logvar)


def _kl_divergence(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    prior = None if prior_mu is None or prior_logvar is None else (prior_mu, prior_logvar)
    return eager.kl_divergence(mu, logvar, prior, mask)


def _log_likelihood(
    x: Tensor,
    params: Sequence[Tensor],
    family: str,
    options: Sequence[float],
    mask: Tensor | None = None,
) -> Tensor:
    return _composite.rows((x, *params), family, options, mask)


def _elbo(
    x: Tensor,
    params: Sequence[Tensor],
    kl: Tensor,
    family: str,
    options: Sequence[float],
    mask: Tensor | None,
    weight: Tensor | None,
    beta: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _log_likelihood(x, params, family, options, mask)
    return *eager.combined(rows, kl, weight, beta, reduction), rows


def _row_forward(
    x: Tensor,
    params: Sequence[Tensor],
    family: str,
    options: Sequence[float],
    mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    if any(needs):
        raise ValueError("a forward pass alone can be decomposed: this program has gradients")
    return _log_likelihood(x, params, family, options, mask), []
