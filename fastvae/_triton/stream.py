"""The latent kernels where row follows row in the stream of noise: no sample_index, and backward
from one draw. A counter's four normals then serve four elements, wherever rows end."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvae._triton.formulas.latent import sample, sample_dlogvar, standard_kl
from fastvae._triton.launch import cdiv
from fastvae._triton.philox import four_normals

STREAM_TILE = 256  # counters


def stream_programs(rows: int, cols: int, first_row: int) -> int:
    """How many programs draw those rows of the stream."""
    blocks = cdiv(first_row * cols % 64 + rows * cols, 64)
    return cdiv(16 * blocks, STREAM_TILE)


@triton.jit
def stream_elements(program, T: tl.constexpr, INDEX: tl.constexpr, first, count, cols):
    """Of this program's counters of a stream in which row follows row: their numbers, and of the
    four elements of each the place behind element `first`, the row, the column and whether it is
    one of the `count`."""
    lane = program.to(INDEX) * T + tl.arange(0, T)
    begin = lane // 16 * 64 + lane % 16 - (first % 64).to(INDEX)
    at = ()
    row = ()
    col = ()
    inside = ()
    for j in tl.static_range(4):
        here = begin + 16 * j
        counts = (here >= 0) & (here < count)
        here = tl.where(counts, here, 0)
        at = at + (here,)
        row = row + (here // cols,)
        col = col + (here % cols,)
        inside = inside + (counts,)
    return first // 64 * 16 + lane, at, row, col, inside


@triton.jit(do_not_specialize=["batch", "sample_offset", "splits", "row_programs", "drawing"])
def sample_stream_kernel(
    mu,
    logvar,
    mu_stride,
    logvar_stride,
    seed,
    z,
    kl,  # [batch, splits], or None
    cols,
    batch,
    num_samples,
    sample_offset,
    chunk,
    splits,
    row_programs,
    drawing,  # programs that draw: the KL may want more
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    MU_COL: tl.constexpr,
    LOGVAR_COL: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """sample_kernel where there is no sample_index: T counters serve four elements each, wherever
    rows end. The KL is then summed row by row."""
    program = tl.program_id(0)
    if program < drawing:
        first = sample_offset.to(tl.int64) * num_samples * cols
        count = batch.to(INDEX) * num_samples * cols
        counter, _at, draw, place, inside = stream_elements(program, T, INDEX, first, count, cols)
        eps = four_normals(tl.load(seed), counter)
        for j in tl.static_range(4):
            b = draw[j] // num_samples
            from_mu = mu + b * mu_stride + place[j] * MU_COL
            from_logvar = logvar + b * logvar_stride + place[j] * LOGVAR_COL
            mean = tl.load(from_mu, mask=inside[j], other=0.0).to(COMPUTE)
            spread = tl.load(from_logvar, mask=inside[j], other=0.0).to(COMPUTE)
            drawn = sample(mean, spread, eps[j].to(COMPUTE))
            out = ((draw[j] - b * num_samples) * batch + b) * cols + place[j]
            tl.store(z + out, drawn.to(z.dtype.element_ty), mask=inside[j])
    if kl is not None:
        split = (program % splits).to(INDEX)
        row = ((program // splits).to(INDEX) * R + tl.arange(0, R))[:, None]
        in_rows = row < batch
        end = tl.where(program < row_programs * splits, cols, 0)
        total = tl.zeros((R, C), COMPUTE)
        for start in range(split * chunk, tl.minimum(split * chunk + chunk, end), C):
            col = (start + tl.arange(0, C))[None, :]
            valid = in_rows & (col < cols)
            m = tl.load(mu + row * mu_stride + col * MU_COL, mask=valid, other=0.0).to(COMPUTE)
            lv = tl.load(logvar + row * logvar_stride + col * LOGVAR_COL, mask=valid, other=0.0)
            v, _ = standard_kl((m, lv.to(COMPUTE)), ())
            total += tl.where(valid, v, 0.0)
        tl.store(kl + row * splits + split, tl.sum(total, 1, keep_dims=True), mask=in_rows)


@triton.jit
def with_kl(g_mu, g_logvar, mu, logvar, w):
    """The gradients with the KL's, which is w upstream."""
    _, d = standard_kl((mu, logvar), ())
    some = w != 0.0  # not 0 · ∞: β may be 0 where the KL is infinite
    w += tl.zeros_like(mu)
    return tl.where(some, tl.fma(w, d[0], g_mu), g_mu), tl.where(
        some, tl.fma(w, d[1], g_logvar), g_logvar
    )


@triton.jit(do_not_specialize=["batch", "sample_offset"])
def sample_stream_backward_kernel(
    grad_z,  # [batch, cols]
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
    cols,
    batch,
    sample_offset,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    GRAD_Z_COL: tl.constexpr,
    MU_COL: tl.constexpr,
    LOGVAR_COL: tl.constexpr,
    T: tl.constexpr,
):
    """sample_backward_kernel of one draw, as sample_stream_kernel draws it."""
    first = sample_offset.to(tl.int64) * cols
    count = batch.to(INDEX) * cols
    program = tl.program_id(0)
    counter, at, row, col, inside = stream_elements(program, T, INDEX, first, count, cols)
    eps = four_normals(tl.load(seed), counter)
    for j in tl.static_range(4):
        from_z = grad_z + row[j] * grad_z_stride + col[j] * GRAD_Z_COL
        from_logvar = logvar + row[j] * logvar_stride + col[j] * LOGVAR_COL
        g_mu = tl.load(from_z, mask=inside[j], other=0.0).to(COMPUTE)
        lv = tl.load(from_logvar, mask=inside[j], other=0.0).to(COMPUTE)
        g_logvar = sample_dlogvar(lv, eps[j].to(COMPUTE) * g_mu)
        if grad_kl is not None:
            from_mu = mu + row[j] * mu_stride + col[j] * MU_COL
            m = tl.load(from_mu, mask=inside[j], other=0.0).to(COMPUTE)
            w = tl.load(grad_kl + row[j] * grad_kl_stride, mask=inside[j], other=0.0).to(COMPUTE)
            g_mu, g_logvar = with_kl(g_mu, g_logvar, m, lv, w)
        tl.store(grad_mu + at[j], g_mu.to(grad_mu.dtype.element_ty), mask=inside[j])
        tl.store(grad_logvar + at[j], g_logvar.to(grad_logvar.dtype.element_ty), mask=inside[j])
