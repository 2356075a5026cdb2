"""How kernels are launched: the block rule, and one place through which every launch goes."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from fastvae._C import launch_key

# The block rule. A program has 128 threads and a tile of 1024 elements in one iteration, so each
# thread has 8: one 128-bit access of a 16-bit type, two of float32 (float64 has half the tile), and
# registers left for eight programs on a multiprocessor. Rows shorter than a tile share it; longer
# ones loop over it, and are split over programs until there are PROGRAMS of them. All of it follows
# from the shape and the dtype: nothing is tuned at the first step, and no result depends on what
# the device is.
THREADS = 128
TILE = 1024
PROGRAMS = 1024


def compute_type(*dtypes: torch.dtype) -> Any:
    """What the kernel computes in."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes 2 µs, of the 30 that a whole operator may


@functools.lru_cache(maxsize=1024)
def tile_shape(cols: int, least: int = 1, tile: int = TILE) -> tuple[int, int]:
    """(rows, columns) of a program's tile; the columns are a power of two, at least `least`."""
    columns = min(tile, max(least, 1 << max(cols - 1, 0).bit_length()))
    return tile // columns, columns


@functools.lru_cache(maxsize=1024)
def splits(row_programs: int, cols: int, columns: int) -> tuple[int, int]:
    """Into how many chunks each row is cut, and how many columns one has."""
    tiles = cdiv(cols, columns)
    wanted = min(tiles, cdiv(PROGRAMS, row_programs))
    chunk = cdiv(tiles, max(wanted, 1)) * columns
    return max(cdiv(cols, max(chunk, 1)), 1), max(chunk, columns)


def index_type(*tensors: Tensor | None, beyond: int = 0) -> Any:
    """int32, or int64 where an offset into one of the tensors, or a column up to `beyond`, can pass
    2³¹."""
    limit = 2**31 - 4 * TILE - beyond
    far = limit < 0 or any(
        t is not None and t.untyped_storage().nbytes() >= limit * t.itemsize for t in tensors
    )
    return tl.int64 if far else tl.int32


# A NaN that no arithmetic gives. Triton passes an integer that fits in 32 bits as another type, to
# another kernel, as it did the bits of 0.0: with these taken out of them, no number's do.
UNUSED_NAN = 0x7FF5555500000000


def constant(value: float, dtype: torch.dtype) -> float | int:
    """A number for the kernel, whose `number` undoes it: one kernel for all numbers. Triton passes
    a float as float32; a double travels as its bits."""
    if dtype != torch.float64:
        return value
    return struct.unpack("<q", struct.pack("<d", value))[0] ^ UNUSED_NAN


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


def options(warp_size: int) -> dict[str, Any]:
    """No contraction but the fma that the source has: the bits are part of the contract."""
    return {"num_warps": THREADS // warp_size, "enable_fp_fusion": False}


def device_options() -> dict[str, Any]:
    """For the current device. Of AMD's, CDNA has 64 threads in a warp and RDNA 32."""
    return _options_of(torch.cuda.current_device()) if torch.version.hip else _NVIDIA


@functools.cache
def _options_of(device: int) -> dict[str, Any]:
    return options(torch.cuda.get_device_properties(device).warp_size)


_NVIDIA = options(32)


# What Triton compiled, by what it would look at: its own look takes longer than the launch. What
# it looks at besides (hooks before a run, knobs for debugging) counts at a kernel's first launch.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
    """Runs the kernel, in one dimension: the others of a grid end at 65,535. The constants are
    named in its own order."""
    if programs >= 2**31:
        raise ValueError(f"a kernel has at most 2^31 - 1 programs, these tensors need {programs}")
    if _launcher is not None:
        _launcher(kernel, programs, *args, **constexprs)
    elif interpreting():
        import numpy as np  # the interpreter's dependency, not ours

        with np.errstate(all="ignore"):
            kernel[(programs,)](*args, **constexprs)
    else:
        arguments, constants = launch_key(args), constexprs.values()
        key = (id(kernel), driver.active.get_current_device(), arguments, *constants)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[(programs, 1, 1)](*args, *constants)
            return
        compiled = kernel[(programs,)](*args, **constexprs, **device_options())
        if arguments is not None and compiled is not None:
            _compiled[key] = compiled


@functools.cache
def interpreting() -> bool:
    """Whether the kernels were built for Triton's interpreter, which runs them on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
