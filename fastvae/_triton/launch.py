"""How kernels are launched: the block rule, and one place through which every launch goes."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# The block rule. A program has 4 warps and a tile of 2048 elements in one iteration, so each
# thread has 16: 128-bit accesses for every dtype from 1 to 8 bytes, and four of them in flight per
# float32 input. Rows shorter than a tile share it; longer ones loop over it, and are split over
# programs until there are PROGRAMS of them. All of it follows from the shape and the dtype, so
# that there is nothing to tune at the first step, and results do not depend on the device.
WARPS = 4
TILE = 2048
PROGRAMS = 1024

COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


def tile_shape(cols: int, least: int = 1, tile: int = TILE) -> tuple[int, int]:
    """(rows, columns) of a program's tile; the columns are a power of two, at least `least`."""
    columns = min(tile, max(least, triton.next_power_of_2(cols)))
    return tile // columns, columns


def splits(row_programs: int, cols: int, columns: int) -> tuple[int, int]:
    """Into how many chunks each row is cut, and how many columns one has."""
    tiles = triton.cdiv(cols, columns)
    wanted = min(tiles, triton.cdiv(PROGRAMS, row_programs))
    chunk = triton.cdiv(tiles, max(wanted, 1)) * columns
    return max(triton.cdiv(cols, max(chunk, 1)), 1), max(chunk, columns)


def index_type(*tensors: Tensor | None) -> Any:
    """int32, or int64 where an offset into one of the tensors can pass 2³¹."""
    far = max(
        sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        for t in tensors
        if t is not None
    )
    return tl.int64 if far + 2 * TILE >= 2**31 else tl.int32


def constant(value: float, dtype: torch.dtype) -> float | int:
    """A number for the kernel. Triton passes a float as float32; a double travels as its bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if dtype == torch.float64 else value


_launcher: Callable[..., Any] | None = None


@contextlib.contextmanager
def launches_to(launcher: Callable[..., Any]) -> Iterator[None]:
    """Hands each launch (kernel, grid, arguments, options) to `launcher` instead of a device."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before


def launch(kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
    """Runs the kernel. No contraction but the fma that the source has: the bits are part of it."""
    options = {**constexprs, "num_warps": WARPS, "enable_fp_fusion": False}
    if programs >= 2**31:
        raise ValueError(f"a kernel has at most 2^31 - 1 programs, these tensors need {programs}")
    if _launcher is not None:
        _launcher(kernel, programs, *args, **options)
    elif interpreting():
        with np.errstate(all="ignore"):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)


def interpreting() -> bool:
    """Whether the kernels were built for Triton's interpreter, which runs them on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
