"""Counter-based standard normals: Philox4x32-10 and Box–Muller, as csrc/math/philox.h.

The normal of element i depends on (seed, i) alone: counter 16·(i div 64) + i mod 16, and of that
counter's four normals the (i mod 64) div 16-th.
"""

import triton
import triton.language as tl

from fastvae._triton.math import log_normal, sincospi, sqrt


@triton.jit
def box_muller(a, b):
    """Two normals from two words; u has 31 bits and is never 0, so the tail reaches 6.66σ."""
    u = tl.fma((a >> 1).to(tl.int32).to(tl.float32), 2.0**-31, 2.0**-32)
    radius = sqrt(-2.0 * log_normal(u, 0.0, 0.0))
    sin, cos = sincospi(b.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31)
    return radius * cos, radius * sin


@triton.jit
def words(seed, counter):
    """The four words of a 64-bit counter."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def four_normals(seed, counter):
    """All that a counter has."""
    w0, w1, w2, w3 = words(seed, counter)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def columns(start, TILE: tl.constexpr, FOUR: tl.constexpr):
    """The columns from `start` that `normals` fills, as a tuple of vectors.

    FOUR: a counter's four normals are 16 elements apart, so a thread that draws 4 neighbouring
    counters holds four runs of 4 neighbours: vector loads without a shuffle.
    """
    if FOUR:
        q = tl.arange(0, TILE // 4)
        first = start + 64 * (q // 16) + q % 16
        return first, first + 16, first + 32, first + 48
    else:
        return (start + tl.arange(0, TILE),)


@triton.jit
def normals(seed, row, start, TILE: tl.constexpr, FOUR: tl.constexpr):
    """ε at those columns of the rows that begin at elements `row` [R, 1] of the stream.

    FOUR: the rows and `start` are multiples of 64 elements. Else each element draws its own
    counter, and uses one of its normals.
    """
    if FOUR:
        return four_normals(seed, (row + start) // 4 + tl.arange(0, TILE // 4)[None, :])
    else:
        i = row + start + tl.arange(0, TILE)[None, :]
        w0, w1, w2, w3 = words(seed, (i >> 6 << 4) | (i & 15))
        which = (i >> 4) & 3
        first = which < 2
        cos, sin = box_muller(tl.where(first, w0, w2), tl.where(first, w1, w3))
        return (tl.where(which % 2 == 0, cos, sin),)
