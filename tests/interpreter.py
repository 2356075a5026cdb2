"""Where Triton's interpreter departs from a GPU: repaired, so that the tests see a GPU's values.

It truncates float32 to bfloat16, mixes bfloat16 with float64 as if both were integers, and in
Triton 3.7 its fma rounds twice.
"""

from typing import Any

import numpy as np
import torch


def fused_multiply_add(x: Any, y: Any, z: Any) -> Any:
    """x y + z rounded once, float32: the product is exact in float64, and where the sum is not,
    its last bit is made odd, so that rounding again can't meet a tie."""
    product = x.astype(np.float64) * y.astype(np.float64)
    wide = z.astype(np.float64)
    total = product + wide
    back = total - product
    error = (product - (total - back)) + (wide - back)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + towards, bits).view(np.float64).astype(np.float32)


def repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, fma = builder.cast_impl, builder.create_fma

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        have, want = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (have, want) or have == want or not have.is_floating():
            return cast(self, src, dst_type)
        if have == tl.bfloat16:  # exactly, by its bits; float32 holds every bfloat16
            wide = interpreter.TensorHandle(
                (src.data.astype(np.uint32) << 16).view(np.float32), tl.float32
            )
            return wide if want == tl.float32 else cast(self, wide, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits.reshape(src.data.shape), want)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return fma(self, x, y, z)
        once = fused_multiply_add(*np.broadcast_arrays(x.data, y.data, z.data))
        return interpreter.TensorHandle(once, z.dtype.scalar)

    builder.cast_impl = cast_impl
    if triton_before_3_9():
        builder.create_fma = create_fma


def triton_before_3_9() -> bool:
    import triton

    return tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9)
