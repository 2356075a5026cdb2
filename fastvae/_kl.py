"""Where the KL is summed, and what lies below it free of charge: views, for the one kernel."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastvae._backends import Ops, Prior
from fastvae._composite import compute_dtype

FREE_BITS_PER = ("dimension", "element", "sample", "batch")


def divergence(
    ops: Ops,
    mu: Tensor,
    logvar: Tensor,
    prior: Prior | None,  # in mu's shape, as is the mask
    mask: Tensor | None,
    batch_dims: int = 1,
    per: str = "sample",
) -> Tensor:
    """As `fastvae.kl_divergence`. The kernel sums along rows: [B, *event] to [B]. Down the columns,
    which lie far apart in memory, torch sums what it makes of each element."""
    if prior is not None and (dtype := prior[0].dtype) != mu.dtype:
        mu, logvar = mu.to(dtype), logvar.to(dtype)
    batch = mu.shape[:batch_dims]

    def rows(t: Tensor) -> Tensor:
        if per != "sample":
            return t.flatten()
        if batch_dims == 0:
            return t[None]
        return t.flatten(0, batch_dims - 1) if batch_dims > 1 else t

    of_prior = None if prior is None else (rows(prior[0]), rows(prior[1]))
    of_mask = None if mask is None else rows(mask)
    kl = ops.kl_divergence(rows(mu), rows(logvar), of_prior, of_mask)
    if per == "element":
        return kl.view(mu.shape)
    if per == "dimension":
        kl, over = kl.view(mu.shape), tuple(range(batch_dims))
        if not over or batch.numel() == 0:
            return kl.sum(over) if over else kl
        return kl.mean(over) if mask is None else kl.sum(over) / mask.sum(over).clamp(min=1)
    return kl if batch_dims == 1 else kl.view(batch)


def floored(kl: Tensor, floor: float, per: str, mask: Tensor | None = None) -> Tensor:
    """Free bits of a KL per sample or, of "dimension" and "element", per element: [B], or the
    batch's, []. What is masked out has none; a mean is over the batch all the same."""
    if floor == 0:
        return kl
    kl = kl.to(compute_dtype(kl.dtype))
    if per in ("dimension", "batch"):
        kl = kl.mean(0)
        mask = None if mask is None or per == "batch" else mask.any(0)
    elif per == "sample" and mask is not None:
        mask = mask.flatten(1).any(1) if mask.dim() > 1 else mask
    # Traced, a number would be a constant, and each a graph of its own.
    free = kl.clamp(min=kl.new_ones(()) * floor if is_compiling() else floor)
    free = free if mask is None else torch.where(mask, free, 0)
    if per == "dimension":
        return free.sum()
    return free.flatten(1).sum(1) if free.dim() > 1 else free
