"""The kernel of formulas with planes: sites, each with its classes or components. A thread has
neighbouring sites and walks through their planes, which may lie anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae._triton.formulas import sites as formulas
from fastvae._triton.launch import (
    PROGRAMS,
    THREADS,
    cdiv,
    compute_type,
    constant,
    index_type,
    launch,
    splits,
    tile_shape,
)
from fastvae._triton.operands import number, row_of, widen


@triton.jit(do_not_specialize=["scale", "rows", "batch", "splits"])
def sites_kernel(
    inputs,  # pointers, in the formula's order …
    strides,  # … and the distances of their rows …
    plane_strides,  # … planes …
    col_strides,  # … and columns
    planes,
    mask,
    mask_stride,
    mask_step,
    weight,  # multiplies the row's gradients, as scale does
    weight_stride,
    scale,
    constants,  # the formula's options; Triton has an argument of that name itself
    grads,  # one pointer per input, or None; rows lie end to end
    grad_plane_strides,
    grad_col_strides,
    value,  # [rows, splits]
    rows,
    cols,
    batch,
    chunk,
    splits,
    FORMULA: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BATCHED: tl.constexpr,  # of each input, the mask, the weight: [batch] rows, not [K·batch]
    NEEDS: tl.constexpr,  # bit j: the gradient of input j is wanted
    R: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0)
    split = (program % splits).to(INDEX)
    row = ((program // splits).to(INDEX) * R + tl.arange(0, R))[:, None]
    in_rows = row < rows
    n: tl.constexpr = len(inputs)

    fixed = ()
    for k in tl.static_range(len(constants)):
        fixed = fixed + (number(constants[k], COMPUTE),)
    factor = tl.zeros((R, C), COMPUTE) + number(scale, COMPUTE)
    if weight is not None:
        of_row = weight + row_of(row, batch, BATCHED[n + 1]) * weight_stride
        factor = factor * widen(tl.load(of_row, mask=in_rows, other=0.0), COMPUTE)

    total = tl.zeros((R, C), COMPUTE)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, cols), C):
        col = start + tl.arange(0, C)[None, :]
        stored = in_rows & (col < cols)
        counted = stored
        if mask is not None:
            at = mask + row_of(row, batch, BATCHED[n]) * mask_stride + col * mask_step
            counted = stored & (tl.load(at, mask=stored, other=0) != 0)
        pointers = ()
        distances = ()
        outs = ()
        out_distances = ()
        for j in tl.static_range(n):
            at = row_of(row, batch, BATCHED[j]) * strides[j] + col * col_strides[j]
            pointers = pointers + (inputs[j] + at,)
            distances = distances + (tl.cast(plane_strides[j], INDEX),)
            if grads[j] is not None:
                at = row * (planes[j] * cols) + col * grad_col_strides[j]
                outs = outs + (grads[j] + at,)
            else:
                outs = outs + (pointers[j],)
            out_distances = out_distances + (tl.cast(grad_plane_strides[j], INDEX),)
        some = counted & (factor != 0.0)  # not 0 · ∞
        sites = ((pointers, distances), (outs, out_distances), stored, some, factor, NEEDS)
        total += tl.where(counted, FORMULA(sites, planes, fixed), 0.0)

    sums = tl.sum(total, axis=1, keep_dims=True)
    tl.store(value + row * splits + split, sums, mask=in_rows)


def tile_of(element_size: int, sites: int) -> int:
    """The sites of a program: 128 bits for each thread, fewer where there are few sites."""
    tile = THREADS * 16 // element_size
    while tile > THREADS and sites < tile * PROGRAMS:
        tile //= 2
    return tile


def sites(
    family: str,
    inputs: Sequence[Tensor],  # [period, planes, cols] views
    mask: Tensor | None,  # uint8, [period, cols]; a column stride of 0: one value a row
    weight: Tensor | None,  # [period, 1]
    options: Sequence[float],
    scale: float,
    batch: int,
    value: Tensor,  # [rows]
    grads: Sequence[Tensor],  # [rows, planes, cols], rows end to end
    needs: Sequence[bool],
) -> None:
    """Fills value and grads. Rows that are split are summed in a second stage, in a fixed order."""
    rows, cols = value.numel(), inputs[0].shape[2]
    height, width = tile_shape(cols, tile=tile_of(inputs[1].element_size(), rows * cols))
    row_programs = cdiv(rows, height)
    split, chunk = splits(row_programs, cols, width)
    sums = value if split == 1 else value.new_empty(rows, split)

    wanted = iter(grads)
    outs = tuple(next(wanted) if need else None for need in needs)
    operands = (*inputs, mask, weight)
    launch(
        sites_kernel,
        row_programs * split,
        tuple(inputs),
        tuple(t.stride(0) for t in inputs),
        tuple(t.stride(1) for t in inputs),
        tuple(t.stride(2) for t in inputs),
        tuple(t.shape[1] for t in inputs),
        mask,
        0 if mask is None else mask.stride(0),
        0 if mask is None else mask.stride(1),
        weight,
        0 if weight is None else weight.stride(0),
        constant(scale, value.dtype),
        tuple(constant(c, value.dtype) for c in options),
        outs,
        tuple(0 if g is None else g.stride(1) for g in outs),
        tuple(0 if g is None else g.stride(2) for g in outs),
        sums,
        rows,
        cols,
        batch,
        chunk,
        split,
        FORMULA=formulas[family],
        COMPUTE=compute_type(value.dtype),
        INDEX=index_type(*operands, *outs, value, beyond=cols + chunk),
        BATCHED=tuple(t is not None and 1 < t.shape[0] < rows for t in operands),
        NEEDS=sum(1 << j for j, g in enumerate(outs) if g is not None),
        R=height,
        C=width,
    )
    if split > 1:
        torch.sum(sums, 1, out=value)
