"""The row kernel: any formula, its value summed along rows, with its gradients, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae._triton.formulas import formulas, heavy
from fastvae._triton.launch import (
    TILE,
    cdiv,
    compute_type,
    constant,
    index_type,
    launch,
    splits,
    tile_shape,
)
from fastvae._triton.operands import narrow, number, row_of, widen


@triton.jit(do_not_specialize=["scale", "rows", "batch", "splits"])
def rowwise_kernel(
    inputs,  # pointers, in the formula's order …
    strides,  # … and the distances of their rows
    mask,
    mask_stride,
    weight,  # multiplies the row's gradients, as scale does
    weight_stride,
    scale,
    constants,  # the formula's options; Triton has an argument of that name itself
    grads,  # one pointer per input: dense, or sums along the row [rows, splits]; or None
    value,  # [rows, splits]
    rows,
    cols,
    batch,
    chunk,
    splits,
    FORMULA: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    PER_ROW: tl.constexpr,  # of each input: one element serves the whole row
    BATCHED: tl.constexpr,  # of each input, the mask, the weight: [batch] rows, not [K·batch]
    MASK_PER_ROW: tl.constexpr,
    NEEDS: tl.constexpr,  # of each input: 0 no gradient, 1 a dense one, 2 a summed one
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
    factor = number(scale, COMPUTE)
    if weight is not None:
        of_row = weight + row_of(row, batch, BATCHED[n + 1]) * weight_stride
        factor = factor * widen(tl.load(of_row, mask=in_rows, other=0.0), COMPUTE)

    some = in_rows
    if weight is not None:  # not 0 · ∞: β may be 0 where the KL is infinite
        some = in_rows & (factor != 0.0)

    total = tl.zeros((R, C), COMPUTE)
    sums = ()
    for j in tl.static_range(n):
        if NEEDS[j] == 2:
            sums = sums + (tl.zeros((R, C), COMPUTE),)

    for start in range(split * chunk, tl.minimum(split * chunk + chunk, cols), C):
        lane = tl.arange(0, C)[None, :]
        col = start + lane
        valid = in_rows & (col < cols)
        x = ()
        for j in tl.static_range(n):
            at = inputs[j] + row_of(row, batch, BATCHED[j]) * strides[j]
            if PER_ROW[j]:
                x = x + (widen(tl.load(at, mask=in_rows, other=0.0), COMPUTE),)
            else:
                x = x + (widen(tl.load(at + start + lane, mask=valid, other=0.0), COMPUTE),)
        if mask is not None:
            at = mask + row_of(row, batch, BATCHED[n]) * mask_stride
            keep = tl.load(at + (col * 0 if MASK_PER_ROW else col), mask=valid, other=0)
            valid = valid & (keep != 0)

        v, g = FORMULA(x, fixed)
        total += tl.where(valid, v, 0.0)
        new = ()
        for j in tl.static_range(n):
            if NEEDS[j] > 0:
                gradient = tl.where(valid & some, factor * g[j], 0.0)
                if NEEDS[j] == 2:
                    new = new + (sums[len(new)] + gradient,)
                else:
                    at = grads[j] + row * cols + start + lane
                    tl.store(at, narrow(gradient, grads[j]), mask=in_rows & (col < cols))
        sums = new

    part = row * splits + split
    tl.store(value + part, tl.sum(total, axis=1, keep_dims=True), mask=in_rows)
    done = ()
    for j in tl.static_range(n):
        if NEEDS[j] == 2:
            s = tl.sum(sums[len(done)], axis=1, keep_dims=True)
            tl.store(grads[j] + part, s, mask=in_rows)
            done = done + (j,)


def rowwise(
    family: str,
    inputs: Sequence[Tensor],  # [period, cols] views; a column stride of 0: one value a row
    mask: Tensor | None,  # uint8, likewise
    weight: Tensor | None,  # likewise
    options: Sequence[float],
    scale: float,
    batch: int,
    value: Tensor,  # [rows]
    grads: Sequence[Tensor],  # [rows, cols], or [rows] where the gradient is summed
    needs: Sequence[bool],
) -> None:
    """Fills value and grads. Rows that are split are summed in a second stage, in a fixed order."""
    rows, cols = value.numel(), inputs[0].shape[1]
    tile = TILE if value.dtype == torch.float32 else TILE // 2
    height, width = tile_shape(cols, tile=tile // 2 if family in heavy else tile)
    row_programs = cdiv(rows, height)
    split, chunk = splits(row_programs, cols, width)

    stages = []  # (result, its parts) of the rows that are split

    def summed(out: Tensor) -> Tensor:
        if split == 1:
            return out
        stages.append((out, out.new_empty(rows, split)))
        return stages[-1][1]

    wanted = iter(grads)
    given = [next(wanted) if need else None for need in needs]
    kinds = tuple(0 if g is None else 1 if g.dim() == 2 else 2 for g in given)
    outs = tuple(summed(g) if g is not None and g.dim() == 1 else g for g in given)
    sums = summed(value)

    operands = (*inputs, mask, weight)
    launch(
        rowwise_kernel,
        row_programs * split,
        tuple(inputs),
        tuple(t.stride(0) for t in inputs),
        mask,
        0 if mask is None else mask.stride(0),
        weight,
        0 if weight is None else weight.stride(0),
        constant(scale, value.dtype),
        tuple(constant(c, value.dtype) for c in options),
        outs,
        sums,
        rows,
        cols,
        batch,
        chunk,
        split,
        FORMULA=formulas[family],
        COMPUTE=compute_type(value.dtype),
        INDEX=index_type(*operands, *outs, value, beyond=cols + chunk),
        PER_ROW=tuple(t.stride(1) == 0 for t in inputs),
        BATCHED=tuple(t is not None and 1 < t.shape[0] < rows for t in operands),
        MASK_PER_ROW=mask is not None and mask.stride(1) == 0,
        NEEDS=kinds,
        R=height,
        C=width,
    )
    for out, parts in stages:
        torch.sum(parts, 1, out=out)
