"""torch.ops.fastvae for tracing and vmap: what operators return without running, and lanes."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastvae import _composite
from fastvae._backends import eager
from fastvae._composite import compute_dtype
from fastvae.likelihoods._base import sites

register = torch.library.register_fake
ops = torch.ops.fastvae


@register("fastvae::seed")
def _seed(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return like.new_empty(1, dtype=torch.int64)


@register("fastvae::noise")
def _noise(
    seed: Tensor,
    size: Sequence[int],
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None = None,
) -> Tensor:
    return seed.new_empty(num_samples, *size, dtype=torch.float32)


@register("fastvae::noise_each")
def _noise_each(
    seeds: Tensor,
    size: Sequence[int],
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None = None,
) -> Tensor:
    return seeds.new_empty(seeds.shape[0], num_samples, *size, dtype=torch.float32)


def _each_lane(
    op: Any, in_dims: tuple[int | None, ...], lanes: int, seeds: Tensor, index: Tensor, *stream: Any
) -> tuple[Tensor, int]:
    """Lane by lane: each has a sample_index of its own, which no operator takes several of."""
    rows = index.movedim(cast(int, in_dims[4]), 0)
    each = [seeds] * lanes if in_dims[0] is None else list(seeds.movedim(in_dims[0], 0))
    return torch.stack([op(s, *stream, i) for s, i in zip(each, rows, strict=True)]), 0


@torch.library.register_vmap("fastvae::noise")
def _noise_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    seed: Tensor,
    size: Sequence[int],
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None = None,
) -> tuple[Tensor, int]:
    """A seed for each lane under randomness="different"; one for all otherwise."""
    lanes, stream = info.batch_size, (size, num_samples, sample_offset)
    if sample_index is not None and in_dims[4] is not None:
        return _each_lane(ops.noise, in_dims, lanes, seed, sample_index, *stream)
    seeds = seed.movedim(cast(int, in_dims[0]), 0).reshape(lanes)  # else no lane would differ
    return ops.noise_each(seeds, *stream, sample_index), 0


@torch.library.register_vmap("fastvae::noise_each")
def _noise_each_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    seeds: Tensor,
    size: Sequence[int],
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Nested: the lanes of both as one dimension."""
    stream = (size, num_samples, sample_offset)
    if sample_index is not None and in_dims[4] is not None:
        return _each_lane(ops.noise_each, in_dims, info.batch_size, seeds, sample_index, *stream)
    both = seeds.movedim(cast(int, in_dims[0]), 0)
    return ops.noise_each(both.flatten(), *stream, sample_index).unflatten(0, both.shape), 0


def _sample_like(mu: Tensor, num_samples: int | None) -> Tensor:
    return mu.new_empty(mu.shape if num_samples is None else (num_samples, *mu.shape))


def _rows(t: Tensor, lead: int = 1) -> Tensor:
    return t.new_empty(t.shape[:lead], dtype=compute_dtype(t.dtype))


@register("fastvae::rsample")
def _rsample(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None = None,
    sample_offset: int = 0,
    sample_index: Tensor | None = None,
) -> Tensor:
    return _sample_like(mu, num_samples)


@register("fastvae::rsample_kl")
def _rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None = None,
    sample_offset: int = 0,
    sample_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _sample_like(mu, num_samples), _rows(mu)


@register("fastvae::rsample_backward")
def _rsample_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sample_offset: int,
    sample_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def _event_like(
    full: Tensor, shape: Sequence[int], lead: int, dtype: torch.dtype, planes: bool = False
) -> Tensor:
    """Empty, its event dimensions in the order in which those of `full` lie densely in memory, if
    they do: csrc/common.cpp's memory_order and empty_event, and csrc/rowwise.cpp's layout_of."""
    order = sorted(range(lead, full.dim()), key=full.stride, reverse=True)
    wide = [d for d in order if full.shape[d] != 1]
    dense = all(
        full.stride(outer) == full.stride(inner) * full.shape[inner]
        for outer, inner in itertools.pairwise(wide)
    )
    if not dense or (planes and lead in wide[1:-1]):  # planes among the event's dimensions
        return full.new_empty(shape, dtype=dtype)
    dims = [*range(lead), *order]
    stored = full.new_empty([shape[d] for d in dims], dtype=dtype)
    return stored.permute([dims.index(d) for d in range(full.dim())])


@register("fastvae::kl_divergence")
def _kl_divergence(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    return _rows(mu)


def _row_dims(x: Tensor, params: Sequence[Tensor], family: str) -> int:
    return params[0].dim() - x.dim() + 1 - (family in sites)


@register("fastvae::row_forward")
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
    full, planes = params[0], family in sites
    event_dims = x.dim() - 1
    lead = _row_dims(x, params, family)
    compute = compute_dtype(full.dtype)
    grads = []
    for j, t in enumerate((x, *params)):
        if not needs[j]:
            continue
        if planes:
            grads.append(_event_like(full, t.shape, lead, t.dtype, planes))
        elif j == 0 or t.shape == full.shape:
            grads.append(_event_like(full, full.shape, lead, t.dtype))
        elif t.dim() == full.dim() and all(n == 1 for n in t.shape[:lead]) and t.numel() != 1:
            grads.append(_event_like(full, t.shape, lead, compute))  # summed over the rows
        else:  # constant along each row: one value per row
            shape = (*full.shape[:lead], *[1] * event_dims)
            grads.append(full.new_empty(shape, dtype=compute))
    return _rows(full, lead), grads


@register("fastvae::log_likelihood")
def _log_likelihood(
    x: Tensor,
    params: Sequence[Tensor],
    family: str,
    options: Sequence[float],
    mask: Tensor | None = None,
) -> Tensor:
    return _rows(params[0], _row_dims(x, params, family))


@register("fastvae::elbo_reduce")
def _elbo_reduce(
    log_likelihood: Tensor, kl: Tensor, weight: Tensor | None, beta: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(compute_dtype(log_likelihood.dtype), compute_dtype(kl.dtype))
    shape = kl.shape if reduction == "none" else ()
    loss, ll, kl_out = (log_likelihood.new_empty(shape, dtype=dtype) for _ in range(3))
    return loss, ll, kl_out


@register("fastvae::elbo_inplace")
@register("fastvae::elbo")
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
    return *_elbo_reduce(rows, kl, weight, beta, reduction), rows


@register("fastvae::count_nonfinite")
def _count_nonfinite(
    state: Tensor, rows: Tensor, kl: Tensor, weight: Tensor | None = None
) -> None: ...


torch.library.register_kernel("fastvae::count_nonfinite", "cuda", eager.count_nonfinite)


def rsample_composite(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None = None,
    sample_offset: int = 0,
    sample_index: Tensor | None = None,
) -> Tensor:
    eps = ops.noise(seed, mu.shape, num_samples or 1, sample_offset, sample_index)
    return _composite.sample(mu, logvar, eps.squeeze(0) if num_samples is None else eps)


_library = torch.library.Library("fastvae", "IMPL")
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    _library.impl("row_composite", _composite.rows, _key)
    _library.impl("rsample_composite", rsample_composite, _key)
