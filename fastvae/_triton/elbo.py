"""elbo's small kernels: the reduction over the batch, and the upstream gradient's product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae._triton.launch import (
    cdiv,
    compute_type,
    constant,
    index_type,
    launch,
    splits,
    tile_shape,
)
from fastvae._triton.operands import number

BLOCK = 1024


@triton.jit(do_not_specialize=["beta", "scale", "batch", "num_samples"])
def elbo_reduce_kernel(
    log_likelihood,  # [num_samples, batch]
    kl,
    weight,
    loss_out,
    log_likelihood_out,
    kl_out,
    beta,
    scale,
    batch,
    num_samples,
    REDUCE: tl.constexpr,  # sum each program's rows, or write each row
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    b = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = b < batch
    ll = tl.zeros((BLOCK,), tl.float64)
    for k in range(num_samples):
        at = batch.to(tl.int64) * k + b
        ll += tl.load(log_likelihood + at, mask=valid, other=0.0).to(tl.float64)
    w = tl.full((BLOCK,), 0, tl.float64) + number(scale, tl.float64)
    if weight is not None:
        w *= tl.load(weight + b, mask=valid, other=0.0).to(tl.float64)
    ll = w * (ll / num_samples.to(tl.float64))
    kl_row = w * tl.load(kl + b, mask=valid, other=0.0).to(tl.float64)
    at = b
    if REDUCE:
        ll = tl.sum(ll, 0)
        kl_row = tl.sum(kl_row, 0)
        at = program
        valid = program >= 0
    b_kl = number(beta, tl.float64)
    loss = tl.where(b_kl == 0.0, 0.0, b_kl * kl_row) - ll  # β may be 0 where the KL is infinite
    if loss_out is not None:
        tl.store(loss_out + at, loss.to(loss_out.dtype.element_ty), mask=valid)
    out_type: tl.constexpr = log_likelihood_out.dtype.element_ty
    tl.store(log_likelihood_out + at, ll.to(out_type), mask=valid)
    tl.store(kl_out + at, kl_row.to(out_type), mask=valid)


def elbo_reduce(
    log_likelihood: Tensor,  # [batch] or [num_samples, batch], contiguous
    kl: Tensor,  # [batch]
    weight: Tensor | None,
    beta: float,
    scale: float,
    loss_out: Tensor | None,  # [batch], or a scalar: the sum; None: not wanted
    log_likelihood_out: Tensor,
    kl_out: Tensor,
) -> None:
    """The loss scale · w_b (β kl_b − mean_k ll_kb) and its parts, in float64 inside.

    A large batch goes through partial sums, themselves reduced in the same way.
    """
    batch = kl.shape[0]
    num_samples = log_likelihood.shape[0] if log_likelihood.dim() == 2 else 1
    programs = max(cdiv(batch, BLOCK), 1)
    reduced = loss_out is None or loss_out.dim() == 0
    if batch == 0 and not reduced:
        return
    if programs > 1 and reduced and loss_out is not None:
        parts = kl.new_empty(2, programs, dtype=torch.float64)
        elbo_reduce(log_likelihood, kl, weight, beta, scale, None, parts[0], parts[1])
        elbo_reduce(parts[0], parts[1], None, beta, 1.0, loss_out, log_likelihood_out, kl_out)
        return
    launch(
        elbo_reduce_kernel,
        programs,
        log_likelihood,
        kl,
        weight,
        loss_out,
        log_likelihood_out,
        kl_out,
        constant(beta, torch.float64),
        constant(scale, torch.float64),
        batch,
        num_samples,
        REDUCE=reduced,
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["rows", "splits"])
def scale_grad_kernel(
    grad,
    factor,
    factor_stride,
    rows,
    cols,
    chunk,
    splits,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0)
    split = (program % splits).to(INDEX)
    row = ((program // splits).to(INDEX) * R + tl.arange(0, R))[:, None]
    in_rows = row < rows
    f = tl.load(factor + row * factor_stride, mask=in_rows, other=1.0).to(COMPUTE)
    # loss.backward() sends 1: nothing to do, and no host had to look.
    if tl.sum((f != 1.0).to(tl.int32)) > 0:
        for start in range(split * chunk, tl.minimum(split * chunk + chunk, cols), C):
            col = (start + tl.arange(0, C))[None, :]
            valid = in_rows & (col < cols)
            at = grad + row * cols + col
            g = tl.load(at, mask=valid, other=0.0).to(COMPUTE)
            tl.store(at, (f * g).to(grad.dtype.element_ty), mask=valid)


def scale_grad(
    grad: Tensor,  # [rows, cols]
    factor: Tensor,  # [rows], any stride
) -> None:
    """grad *= factor, row by row, in place; rows whose factor is 1 are not touched."""
    rows, cols = grad.shape
    height, width = tile_shape(cols)
    row_programs = cdiv(rows, height)
    split, chunk = splits(row_programs, cols, width)
    launch(
        scale_grad_kernel,
        row_programs * split,
        grad,
        factor,
        factor.stride(0),
        rows,
        cols,
        chunk,
        split,
        COMPUTE=compute_type(grad.dtype),
        INDEX=index_type(grad, factor, beyond=cols + chunk),
        R=height,
        C=width,
    )
