"""Count likelihoods; csrc/formulas/counts.h in Triton, where no lanes are packed.

Every element goes through the product for counts up to 16, and a program that meets a larger one
through Stirling's series as well.
"""

import triton
import triton.language as tl

from fastvae._triton.math import exp, exp_negative, log, log1p, log1p_unit, maximum, reciprocal

LIMIT = tl.constexpr(16)
HALF_LN_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def log_gamma_rest(inverse):
    """ln Γ(z) − (z − ½) ln z + z − ½ ln 2π of 1/z, for z ≥ 8, and z ≥ 16 in float64."""
    s = inverse * inverse
    if inverse.dtype == tl.float64:
        rest = (-691.0 / 360360.0) * s + 1.0 / 1188.0
        rest = (rest * s - 1.0 / 1680.0) * s + 1.0 / 1260.0
    else:
        rest = 1.0 / 1260.0
    return inverse * ((rest * s - 1.0 / 360.0) * s + 1.0 / 12.0)


@triton.jit
def digamma_rest(inverse):
    """ln z − ψ(z), likewise."""
    s = inverse * inverse
    if inverse.dtype == tl.float64:
        rest = ((1.0 / 12.0) * s - 691.0 / 32760.0) * s + 1.0 / 132.0
        rest = (rest * s - 1.0 / 240.0) * s + 1.0 / 252.0
    else:
        rest = 1.0 / 252.0
    return s * ((rest * s - 1.0 / 120.0) * s + 1.0 / 12.0) + 0.5 * inverse


@triton.jit
def log1p_of(a, one_plus_a):
    """ln(1 + a), where the caller knows 1 + a without the cancellation."""
    return tl.where(tl.abs(a) < 0.5, log1p(a), log(one_plus_a))


@triton.jit
def beyond(x):
    """Whether this program has a count beyond the product's limit."""
    return tl.max(tl.max(x, 1), 0) > LIMIT


@triton.jit
def log_factorial(x):
    """ln x! for x in [0, 16]."""
    product = x * 0.0 + 1.0
    for i in tl.static_range(1, 16):
        product = tl.where(x > i, product * (i + 1.0), product)
    return log(product)


@triton.jit
def poisson(inputs, options):
    """ln p(x | m) = x ln m − m − ln x!, m = size · mean + eps."""
    x, mean, size = inputs
    (eps,) = options
    m = size * mean + eps
    above = x - m
    slope = tl.where(x == 0, -1.0, above / m)
    value = tl.where(x == 0, 0.0, x * log(m)) - m - log_factorial(x)
    if beyond(x):
        inverse = 1.0 / tl.where(x > LIMIT, x, 1.0)
        far = x * log1p_of(-above * inverse, m * inverse) + above
        far -= 0.5 * log(x) + HALF_LN_2PI + log_gamma_rest(inverse)
        value = tl.where(x > LIMIT, far, value)
    return value, (slope * 0.0, slope * size, slope * mean)


@triton.jit
def poisson_log(inputs, options):
    """ln p(x | l) = x l − e^l − ln x!"""
    x, log_mean = inputs
    m = exp(log_mean)
    above = x - m
    value = x * log_mean - m - log_factorial(x)
    if beyond(x):
        log_x = log(x)
        far = x * (log_mean - log_x) + above - 0.5 * log_x - HALF_LN_2PI
        far -= log_gamma_rest(1.0 / tl.where(x > LIMIT, x, 1.0))
        value = tl.where(x > LIMIT, far, value)
    return value, (above * 0.0, above)


@triton.jit
def by_product(x, m, theta, inverse):
    """Γ(x + θ) / (Γ(θ) x!) (m / (θ + m))^x as b^x Π (θ + i) / ((θ + 1)(i + 1)); beside the product
    of the factors the sum of their inverses."""
    shifted = theta + 1.0
    unit = 1.0 / shifted
    product = theta * unit + x * 0.0
    sum = product * 0.0 + 1.0
    for i in tl.static_range(1, 16):
        more = x > i
        factor = (theta + i) * (unit * (1.0 / (i + 1)))
        sum = tl.where(more, sum * factor + product * (1.0 / (i + 1)), sum)
        product = tl.where(more, product * factor, product)
    log_b = tl.where(x > 0, log(shifted * inverse * m), 0.0)
    return x * log_b + log(product), unit * (sum / product) - x * inverse


@triton.jit
def by_series(x, m, theta, inverse, above):
    """ln p and its derivative by θ, beyond the limit."""
    k: tl.constexpr = 16 if theta.dtype == tl.float64 else 8
    n = x + theta
    inverse_x = 1.0 / x
    inverse_n = 1.0 / n
    ratio = n * inverse
    relative = above * inverse
    ln_ratio = log1p_of(relative, ratio)
    second = log1p_of(-theta * inverse * (above * inverse_x), m * inverse_x * ratio)
    small = theta < k
    large = tl.where(small, theta + k, theta)
    inverse_large = 1.0 / large
    product = theta * inverse_large
    sum = product * 0.0 + 1.0
    for i in tl.static_range(1, k):
        factor = (theta + i) * inverse_large
        sum = sum * factor + product
        product = product * factor
    ln_small = tl.where(small, log(theta * inverse_large), 0.0)
    moved = tl.where(small, log(product) + k, 0.0)
    value = theta * ln_ratio + x * second + theta * ln_small + moved
    value += 0.5 * log(large * inverse_n * inverse_x) - HALF_LN_2PI
    value += log_gamma_rest(inverse_n) - log_gamma_rest(inverse_x) - log_gamma_rest(inverse_large)
    by_theta = (ln_ratio - relative) + ln_small
    by_theta += tl.where(small, inverse_large * (sum / product), 0.0)
    return value, by_theta + digamma_rest(inverse_large) - digamma_rest(inverse_n)


@triton.jit
def nb(x, m, theta):
    """ln NB(x | m, θ) and its derivatives by m and θ."""
    inverse = 1.0 / (theta + m)
    above = x - m
    l = log1p(m / theta)
    at_zero = x == 0
    by_m = tl.where(at_zero, -theta * inverse, theta * inverse * (above / m))
    value, by_theta = by_product(x, m, theta, inverse)
    value = tl.where(at_zero, 0.0, value) - theta * l
    by_theta = tl.where(at_zero, 0.0, by_theta) + (m * inverse - l)
    if beyond(x):
        far, far_by_theta = by_series(x, m, theta, inverse, above)
        value = tl.where(x > LIMIT, far, value)
        by_theta = tl.where(x > LIMIT, far_by_theta, by_theta)
    return value, by_m, by_theta


@triton.jit
def negative_binomial(inputs, options):
    """ln NB(x | m, θ), m = size · mean + eps; the variance is m + m² / θ."""
    x, mean, theta, size = inputs
    (eps,) = options
    value, by_m, by_theta = nb(x, size * mean + eps, theta)
    return value, (by_m * 0.0, by_m * size, by_theta, by_m * mean)


@triton.jit
def zero_inflated_negative_binomial(inputs, options):
    """ln(π [x = 0] + (1 − π) NB(x)), π = σ(z)."""
    x, mean, theta, size, z = inputs
    (eps,) = options
    value, by_m, by_theta = nb(x, size * mean + eps, theta)
    at_zero = x == 0
    odds = exp_negative(-tl.abs(z))
    less_likely = odds * reciprocal(1.0 + odds)
    inflated = tl.where(z >= 0, 1.0 - less_likely, less_likely)
    gap = z - value
    gain = exp_negative(-tl.abs(gap))
    other = gain * reciprocal(1.0 + gain)
    own = tl.where(at_zero, tl.where(gap >= 0, other, 1.0 - other), 1.0)
    elsewhere = tl.where(at_zero, tl.where(gap >= 0, 1.0 - other, other), 0.0)
    mixed = maximum_of(z, value) + log1p_unit(gain)
    value = tl.where(at_zero, mixed, value) - maximum(z, 0.0) - log1p_unit(odds)
    by_m = own * by_m
    gradients = (by_m * 0.0, by_m * size, own * by_theta, by_m * mean, elsewhere - inflated)
    return value, gradients


@triton.jit
def maximum_of(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
