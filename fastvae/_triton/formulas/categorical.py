"""The categorical log-likelihood; csrc/formulas/categorical.h in Triton."""

import triton
import triton.language as tl

from fastvae._triton.math import exp_negative, log1p, reciprocal
from fastvae._triton.operands import plane, put_gradient

BLOCK = tl.constexpr(64)  # planes that are added one after the other: 50,000 would lose digits


@triton.jit
def categorical(sites, planes, options):
    """ln p(x | l) = l_x − ln Σ_c e^l_c, and ε times its mean over the classes in place of ε."""
    (smoothing,) = options
    x = plane(sites, 0, 0)
    classes = planes[1]
    most = plane(sites, 1, 0)
    for c in range(1, classes):
        most = tl.maximum(most, plane(sites, 1, c), propagate_nan=tl.PropagateNan.ALL)

    chosen = tl.zeros_like(x)
    own, others, total = chosen, chosen, chosen
    for first in range(0, classes, BLOCK):
        some, part = tl.zeros_like(x), tl.zeros_like(x)
        for c in range(first, tl.minimum(first + BLOCK, classes)):
            l = plane(sites, 1, c) - most
            e = exp_negative(l)
            chosen = tl.where(x == c, l, chosen)
            own = tl.where(x == c, e, own)
            some += tl.where(x == c, 0.0, e)
            part += l
        others += some
        total += part

    inverse = reciprocal(others + own)
    each = 1.0 / (tl.zeros_like(x) + classes)
    floor = smoothing * each
    for c in range(classes):
        p = inverse * exp_negative(plane(sites, 1, c) - most)
        put_gradient(sites, 1, c, floor + tl.where(x == c, others * inverse - smoothing, -p))
    smoothed = tl.where(smoothing == 0.0, 0.0, smoothing * (each * total - chosen))
    return chosen + smoothed - log1p(others + (own - 1.0))
