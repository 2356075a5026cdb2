"""How kernels and formulas read what they are given, and write what they give."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvae._triton.launch import UNUSED_NAN

_UNUSED_NAN = tl.constexpr(UNUSED_NAN)


@triton.jit
def number(value, dtype: tl.constexpr):
    """The double (see launch.constant) or float that was passed."""
    if dtype == tl.float64:
        value = (value ^ _UNUSED_NAN).to(tl.float64, bitcast=True)
    return value


@triton.jit
def widen(value, dtype: tl.constexpr):
    """To the compute type; 16-bit floats by way of float32, as the interpreter has no other."""
    if value.dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def narrow(value, pointer):
    """To what the pointer points to."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def row_of(row, batch, BATCHED: tl.constexpr):
    """Which row of an operand belongs to this row: one stored per sample serves all K draws."""
    return row % batch if BATCHED else row


# Sites: what a formula with planes sees. Of each input pointers to its first plane at these sites
# and the distance of its planes; the same for its gradient; which of the sites exist, and which
# count; the gradients' factor; bit j: somebody wants input j's. (Triton 3.6 unpacks one level, and
# puts no None and no tuple of constants into a tuple.)


@triton.jit
def plane(sites, j: tl.constexpr, k):
    """Plane k of input j."""
    given, _wanted, exists, _counts, factor, _needs = sites
    pointers, strides = given
    value = tl.load(pointers[j] + k * strides[j], mask=exists, other=0.0)
    return widen(value, factor.dtype)


@triton.jit
def put_gradient(sites, j: tl.constexpr, k, gradient):
    """d(value) / d(plane k of input j), if it is wanted."""
    _given, wanted, exists, counts, factor, needs = sites
    pointers, strides = wanted
    if (needs >> j) & 1:
        scaled = tl.where(counts, factor * gradient, 0.0)
        tl.store(pointers[j] + k * strides[j], narrow(scaled, pointers[j]), mask=exists)
