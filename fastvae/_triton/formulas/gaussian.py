"""Gaussian log-likelihoods; csrc/formulas/gaussian.h in Triton."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter asks for it)

from fastvae._triton.math import exp


@triton.jit
def gaussian(inputs, constants):
    """ln p(x | m) = c − ½ w (x − m)², w = 1/scale²."""
    x, mean = inputs
    w, c = constants
    d = x - mean
    wd = w * d
    return c - 0.5 * wd * d, (-wd, wd)


@triton.jit
def gaussian_logvar(inputs, constants):
    """ln p(x | m, lv) = −½ (lv + (x − m)² e^−lv) + c."""
    x, mean, logvar = inputs
    (c,) = constants
    d = x - mean
    wd = exp(-logvar) * d
    wdd = wd * d
    return c - 0.5 * (logvar + wdd), (-wd, wd, 0.5 * (wdd - 1.0))
