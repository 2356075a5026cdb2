"""The latent kernels: draw ε, write z, sum the KL; and the backward, which draws the same ε."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae._triton.formulas.latent import sample, sample_dlogvar, standard_kl
from fastvae._triton.launch import TILE, cdiv, compute_type, index_type, launch, splits, tile_shape
from fastvae._triton.philox import columns, normals
from fastvae._triton.stream import (
    STREAM_TILE,
    sample_stream_backward_kernel,
    sample_stream_kernel,
    stream_programs,
    with_kl,
)


@triton.jit
def stream(b, valid, k, cols, num_samples, sample_offset, sample_index):
    """The stream's index of the first element of row b's k-th draw."""
    if sample_index is None:
        sample = b.to(tl.int64) + sample_offset
    else:
        sample = tl.load(sample_index + b, mask=valid, other=0)
    return (sample * num_samples + k) * cols


@triton.jit(do_not_specialize=["rows", "batch", "num_samples", "sample_offset", "splits"])
def sample_kernel(
    mu,
    logvar,
    mu_stride,
    logvar_stride,
    seed,
    z,
    kl,  # [batch, splits], or None
    rows,  # batch · num_samples
    cols,
    batch,
    num_samples,
    sample_offset,
    sample_index,  # int64 [batch], or None: sample_offset + row
    chunk,
    splits,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    MU_COL: tl.constexpr,  # the distance of columns: 1, or 0 where one element serves the row
    LOGVAR_COL: tl.constexpr,
    FOUR: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0)
    split = (program % splits).to(INDEX)
    row = ((program // splits).to(INDEX) * R + tl.arange(0, R))[:, None]
    in_rows = row < rows
    b = row % batch  # z is [num_samples, batch]: each draw reads mu and logvar again, from L2
    first = stream(b, in_rows, row // batch, cols, num_samples, sample_offset, sample_index)
    key = tl.load(seed)

    total = tl.zeros((R, C // 4 if FOUR else C), COMPUTE)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, cols), C):
        at = columns(start, C, FOUR)
        eps = normals(key, first, start, C, FOUR)
        for j in tl.static_range(len(at)):
            col = at[j][None, :]
            valid = in_rows & (col < cols)
            m = tl.load(mu + b * mu_stride + col * MU_COL, mask=valid, other=0.0).to(COMPUTE)
            lv = tl.load(logvar + b * logvar_stride + col * LOGVAR_COL, mask=valid, other=0.0)
            lv = lv.to(COMPUTE)
            drawn = sample(m, lv, eps[j].to(COMPUTE))
            tl.store(z + row * cols + col, drawn.to(z.dtype.element_ty), mask=valid)
            if kl is not None:
                v, _ = standard_kl((m, lv), ())
                total += tl.where(valid, v, 0.0)
    if kl is not None:
        tl.store(kl + row * splits + split, tl.sum(total, 1, keep_dims=True), mask=row < batch)


@triton.jit(do_not_specialize=["batch", "num_samples", "sample_offset", "splits"])
def sample_backward_kernel(
    grad_z,  # [num_samples, batch, cols], or None
    grad_kl,  # [batch], or None
    mu,
    logvar,
    grad_z_stride,
    grad_kl_stride,
    mu_stride,
    logvar_stride,
    seed,
    grad_mu,
    grad_logvar,
    batch,
    cols,
    num_samples,
    sample_offset,
    sample_index,  # int64 [batch], or None: sample_offset + row
    chunk,
    splits,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GRAD_Z_COL: tl.constexpr,
    MU_COL: tl.constexpr,
    LOGVAR_COL: tl.constexpr,
    FOUR: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0)
    start = (program % splits).to(INDEX) * chunk
    row = ((program // splits).to(INDEX) * R + tl.arange(0, R))[:, None]
    in_rows = row < batch
    key = tl.load(seed)
    at = columns(start, C, FOUR)

    dz = ()
    eps_dz = ()
    for j in tl.static_range(len(at)):
        dz = dz + (tl.zeros((R, at[j].shape[0]), COMPUTE),)
        eps_dz = eps_dz + (tl.zeros((R, at[j].shape[0]), COMPUTE),)
    if grad_z is not None:
        for k in range(num_samples):
            first = stream(row, in_rows, k, cols, num_samples, sample_offset, sample_index)
            eps = normals(key, first, start, C, FOUR)
            from_row = grad_z + (batch.to(INDEX) * k + row) * grad_z_stride
            new_dz = ()
            new_eps_dz = ()
            for j in tl.static_range(len(at)):
                col = at[j][None, :]
                valid = in_rows & (col < cols)
                g = tl.load(from_row + col * GRAD_Z_COL, mask=valid, other=0.0).to(COMPUTE)
                new_dz = new_dz + (dz[j] + g,)
                new_eps_dz = new_eps_dz + (eps_dz[j] + eps[j].to(COMPUTE) * g,)
            dz = new_dz
            eps_dz = new_eps_dz

    for j in tl.static_range(len(at)):
        col = at[j][None, :]
        valid = in_rows & (col < cols)
        lv = tl.load(logvar + row * logvar_stride + col * LOGVAR_COL, mask=valid, other=0.0)
        lv = lv.to(COMPUTE)
        g_mu = dz[j]
        g_logvar = eps_dz[j]
        if grad_z is not None:
            g_logvar = sample_dlogvar(lv, eps_dz[j])
        if grad_kl is not None:
            m = tl.load(mu + row * mu_stride + col * MU_COL, mask=valid, other=0.0).to(COMPUTE)
            w = tl.load(grad_kl + row * grad_kl_stride, mask=in_rows, other=0.0).to(COMPUTE)
            g_mu, g_logvar = with_kl(g_mu, g_logvar, m, lv, w)
        out = row * cols + col
        tl.store(grad_mu + out, g_mu.to(grad_mu.dtype.element_ty), mask=valid)
        tl.store(grad_logvar + out, g_logvar.to(grad_logvar.dtype.element_ty), mask=valid)


ENOUGH = 128  # programs: about one for each multiprocessor


def latent_tile(rows: int, cols: int, tile: int) -> tuple[bool, int, int]:
    """Whether all four normals of a counter are used, and the tile, at most as wide as that."""
    four = cols % 64 == 0
    if not four:  # four times the work per element, and no vector loads to gain
        return four, *tile_shape(cols, tile=TILE // 2)
    while tile > TILE // 2 and rows * cols < ENOUGH * tile:  # 512: a counter for each thread
        tile //= 2
    return four, *tile_shape(cols, 64, tile)


def sample_forward(
    mu: Tensor,  # [batch, cols] views; a column stride of 0: one value a row
    logvar: Tensor,
    seed: Tensor,  # int64 [1], on the device: never read back
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None,  # int64 [batch]
    z: Tensor,  # [num_samples · batch, cols]
    kl: Tensor | None,  # [batch]
) -> None:
    """Fills z and kl."""
    rows, cols = z.shape
    batch = mu.shape[0]
    streams = cols % 64 != 0 and sample_index is None
    if streams:
        four, (height, width) = False, tile_shape(cols)  # the KL's tile
    else:  # a quarter of it is loaded at a time; 128 bits of that per thread
        widest = {2: 4 * TILE, 4: 2 * TILE, 8: TILE}[mu.element_size()]
        four, height, width = latent_tile(rows, cols, widest)
    row_programs = cdiv(batch if streams else rows, height)
    split, chunk = splits(row_programs, cols, width)
    parts = kl
    if kl is not None and split > 1:
        parts = kl.new_empty(len(kl), split)
    common: dict[str, Any] = {
        "COMPUTE": compute_type(mu.dtype),
        "INDEX": index_type(mu, logvar, z, beyond=cols + chunk),
        "MU_COL": mu.stride(1),
        "LOGVAR_COL": logvar.stride(1),
    }
    strides = (mu.stride(0), logvar.stride(0))
    draws = (batch, num_samples, sample_offset)
    if streams:
        kl_programs = row_programs * split if kl is not None else 0
        drawing = stream_programs(rows, cols, sample_offset * num_samples)
        launch(
            sample_stream_kernel,
            max(drawing, kl_programs),
            *(mu, logvar, *strides, seed, z, parts, cols, *draws, chunk, split, row_programs),
            drawing,
            **common, T=STREAM_TILE, R=height, C=width,
        )  # fmt: skip
    else:
        launch(
            sample_kernel,
            row_programs * split,
            *(mu, logvar, *strides, seed, z, parts, rows, cols, *draws, sample_index, chunk, split),
            **common, FOUR=four, R=height, C=width,
        )  # fmt: skip
    if kl is not None and parts is not None and parts is not kl:
        torch.sum(parts, 1, out=kl)


def sample_backward(
    grad_z: Tensor | None,  # [num_samples · batch, cols]
    grad_kl: Tensor | None,  # [batch, 1]
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None,
    grad_mu: Tensor,  # [batch, cols]
    grad_logvar: Tensor,
) -> None:
    """Fills grad_mu and grad_logvar. A program has one tile, and loops over the draws."""
    batch, cols = grad_mu.shape
    given = (grad_z, grad_kl, mu, logvar)
    strides = (0 if t is None else t.stride(0) for t in given)
    shared = (*given, *strides, seed, grad_mu, grad_logvar)
    common: dict[str, Any] = {
        "COMPUTE": compute_type(mu.dtype),
        "INDEX": index_type(*given, grad_mu),
        "GRAD_Z_COL": 0 if grad_z is None else grad_z.stride(1),
        "MU_COL": mu.stride(1),
        "LOGVAR_COL": logvar.stride(1),
    }
    if grad_z is not None and num_samples == 1 and cols % 64 != 0 and sample_index is None:
        launch(
            sample_stream_backward_kernel,
            stream_programs(batch, cols, sample_offset),
            *(*shared, cols, batch, sample_offset),
            **common, T=STREAM_TILE,
        )  # fmt: skip
        return
    # Of 16-bit types 64 bits: with 128 there would be registers for two programs.
    four, height, width = latent_tile(batch, cols, TILE if mu.element_size() == 8 else 2 * TILE)
    split = cdiv(cols, width)
    launch(
        sample_backward_kernel,
        cdiv(batch, height) * split,
        *(*shared, batch, cols, num_samples, sample_offset, sample_index, width, split),
        **common, FOUR=four, R=height, C=width,
    )  # fmt: skip
