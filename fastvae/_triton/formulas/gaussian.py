"""Gaussian log-likelihoods; csrc/formulas/gaussian.h in Triton."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter asks for it)

from fastvae._triton.math import exp_factor, times


@triton.jit
def gaussian(inputs, options):
    """ln p(x | m) = c − ½ w (x − m)², w = 1/scale²."""
    x, mean = inputs
    w, c = options
    d = x - mean
    wd = w * d
    return c - 0.5 * wd * d, (-wd, wd)


@triton.jit
def gaussian_logvar(inputs, options):
    """ln p(x | m, lv) = −½ (lv + (x − m)² e^−lv) + c; scaled before it is squared."""
    x, mean, logvar = inputs
    (c,) = options
    precision = exp_factor(-0.5 * logvar)  # 1/σ
    u = times(x - mean, precision)
    g = times(u, precision)
    square = 0.5 * u * u
    return c - 0.5 * logvar - square, (-g, g, square - 0.5)
