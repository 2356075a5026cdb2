"""The kernels' vocabulary: csrc/math/math.h and compounds.h in Triton, operation by operation.

float32: the same polynomials, from +, −, × and fma alone. So the bounds in ULP hold on a GPU as in
the interpreter, and the noise has the C++ kernels' bits. Triton's own exp and log are the
hardware's approximations, which no interpreter shows: exp(−80) is off by tens of ULP. `/` and
rsqrt are too, by 2 ULP (PTX ISA: div.full, rsqrt.approx): they are mended, or used where that may
be.
float64: Triton's exp and log; the rest is built on them.
"""

import triton
import triton.language as tl


@triton.jit
def polynomial_pairs(x, c):
    """c[0] + c[1] x + … in pairs (Estrin)."""
    if len(c) == 1:
        return c[0]
    else:
        p = ()
        for i in tl.static_range(len(c) // 2):
            if x.dtype == tl.float64:  # Triton 3.7's fma rounds a Python number to float32
                p = p + (x * c[2 * i + 1] + c[2 * i],)
            else:
                p = p + (tl.fma(x, c[2 * i + 1], c[2 * i]),)
        if len(c) % 2 == 1:
            p = p + (c[len(c) - 1],)
        return polynomial_pairs(x * x, p)


@triton.jit
def polynomial(x, constant, c):
    """constant + c[0] x + c[1] x² + …, the constant added last."""
    return tl.fma(x, polynomial_pairs(x, c), constant)


@triton.jit
def int_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_bits(i):
    return i.to(tl.float32, bitcast=True)


# Adding 1.5 · 2²³ rounds to an integer and leaves it in the low bits: no conversion instruction,
# of which a GPU has an eighth of the throughput. For |x| < 2²².
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
# The smallest normal float32. One digit less, and Triton 3.7 takes it for a double.
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def round_even(x):
    """The nearest integer as a float, and as the low 22 bits of an int."""
    shifted = x + MAGIC
    return shifted - MAGIC, int_bits(shifted)


@triton.jit
def to_float(i):
    """An integer below 2²² in size."""
    return float_bits(i + MAGIC_BITS) - MAGIC


@triton.jit
def exp_parts(x):
    """e^x = p · 2^n: p, and n in the low bits."""
    n, bits = round_even(x * 1.44269504)
    r = tl.fma(n, -0.693359375, x)  # ln 2 in two parts; n times the first is exact
    r = tl.fma(n, 2.12194440e-4, r)
    c: tl.constexpr = (
        0.16666419804096222,
        0.041668232530355453,
        0.008374898694455624,
        0.0013836740981787443,
    )
    return 1.0 + tl.fma(r * r, polynomial(r, 0.49999991059303284, c), r), bits


@triton.jit
def clamp(x, low, high):
    """Keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def scale2(p, bits):
    """p · 2^n for n in [−252, 252], given as `round_even` does."""
    n = bits - MAGIC_BITS
    half = n >> 1  # in two factors: 2^±150 is no float
    return p * float_bits((half + 127) << 23) * float_bits((n - half + 127) << 23)


@triton.jit
def exp(x):
    """e^x for every x; ≤ 1.2 ULP."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        p, bits = exp_parts(clamp(x, -104.0, 89.0))
        y = scale2(p, bits)
    return y


@triton.jit
def exp_factor(x):
    """e^x for `times`, for every x: it need not be a float itself where the product is one."""
    if x.dtype == tl.float64:
        factor = tl.exp(0.5 * clamp(x, -1400.0, 1400.0)), 0  # of two halves
    else:  # beyond ±174 every product with a float but 0 is 0 or ∞ even when squared
        factor = exp_parts(clamp(x, -174.0, 174.0))
    return factor


@triton.jit
def times(a, factor):
    """a e^x, with an `exp_factor`."""
    p, bits = factor
    return p * a * p if a.dtype == tl.float64 else scale2(a * p, bits)


@triton.jit
def exp_negative(x):
    """e^x for x ≤ 0; ≤ 1.2 ULP; 0 below ln 2⁻¹²⁶, where it would be subnormal."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        p, bits = exp_parts(x)
        y = tl.where(x < -87.33654, 0.0, p * float_bits((bits << 23) + 0x3F800000))
    return y


@triton.jit
def log1p_unit(e):
    """ln(1 + e) for e in [0, 1]."""
    if e.dtype == tl.float64:
        y = log1p(e)
    else:
        c: tl.constexpr = (
            0.33332559466362,
            -0.24987271428108215,
            0.19890747964382172,
            -0.16105692088603973,
            0.12418434768915176,
            -0.08244172483682632,
            0.041478194296360016,
            -0.0134075116366148,
            0.0020302373450249434,
        )
        y = tl.fma(e * e, polynomial(e, -0.4999998211860657, c), e)
    return y


@triton.jit
def log_normal(x, correction, extra_exponent):
    """n ln 2 + ln m + correction for x = 2^n m > 0, normal and finite; float32; ≤ 0.8 ULP."""
    b = int_bits(x)
    k = (b - 0x3F3504F3) >> 23  # the mantissa in [√½, √2): ln m ≈ 0 where x ≈ 1
    f = float_bits(b - (k << 23)) - 1.0
    n = to_float(k) + extra_exponent
    f2 = f * f
    c: tl.constexpr = (
        -0.24999988079071045,
        0.2000206857919693,
        -0.16669125854969025,
        0.14221230149269104,
        -0.12387536466121674,
        0.11859312653541565,
        -0.11768253892660141,
        0.06918381154537201,
    )
    y = tl.fma(f * f2, polynomial(f, 0.3333331346511841, c), correction)
    y = tl.fma(n, -2.12194440e-4, y)
    y = tl.fma(f2, -0.5, y)
    return tl.fma(n, 0.693359375, f + y)


@triton.jit
def log_plus(x, correction):
    """ln x + correction for every x: 0 gives −∞, below 0 and NaN give NaN; float32; ≤ 0.8 ULP."""
    tiny = x < SMALLEST  # subnormals are scaled up into the normal range
    y = log_normal(tl.where(tiny, x * 8388608.0, x), correction, tl.where(tiny, -23.0, 0.0))
    special = tl.where(x == 0, -float("inf"), tl.where(x < 0, float("nan"), x))
    return tl.where((x > 0) & (x < float("inf")), y, special)


@triton.jit
def log(x):
    y = tl.log(x) if x.dtype == tl.float64 else log_plus(x, 0.0)
    return y


@triton.jit
def reciprocal(d):
    """1 / d for d in [1, 2¹⁰⁰]: one step of Newton's after `/`, without tl.div_rn's branches."""
    r = 1.0 / d
    return tl.fma(r, tl.fma(-d, r, 1.0), r)


@triton.jit
def log1p(x):
    """ln(1 + x) for every x; ≤ 0.8 ULP. The rounding c of u = 1 + x is put back: ln(u + c) ≈
    ln u + c / u. Where u is next to 1 that is as large as the result, so the quotient is mended;
    c is 0 from u = 2²⁵ on."""
    u = 1.0 + x
    d = tl.where(u > 0, u, 1.0)
    c = x - (u - 1.0)
    r = 1.0 / d
    q = c * r
    correction = tl.fma(tl.fma(-q, d, c), r, q)
    if x.dtype == tl.float64:
        y = tl.log(u) + tl.where(u < float("inf"), correction, 0.0)
    else:
        y = log_plus(u, correction)
    return tl.where(u == 1.0, x, y)


@triton.jit
def sqrt(x):
    """√x, correctly rounded, for 0 and from 2⁻¹⁰⁰: what NVIDIA's sqrt.rn compiles to (MUFU.RSQ, two
    FMUL, two FFMA) without its slow path for other numbers, whose call costs registers. With an
    rsqrt that is off by a last place (AMD's may be), 3 of 2²⁴ roots are too: from one 2 ULP off,
    s = √x (1 + e) with |e| ≤ 2.5 · 2⁻²³; the step leaves 1.5 e² < 10 · 2⁻⁴⁶, so ≤ 0.50001 ULP."""
    y = tl.rsqrt(x)
    s = x * y
    s = tl.fma(tl.fma(-s, s, x), 0.5 * y, s)
    return tl.where(x > 0, s, x)


@triton.jit
def maximum(a, b):
    """The larger of a and the number b, or NaN. Triton 3.7 rounds a literal that stands alone to
    float32, whatever it meets next: so b gets a's type first."""
    return tl.maximum(a, tl.full((), b, a.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def floored_logs(p, floor):
    """max(ln p, floor), max(ln(1 − p), floor)."""
    return maximum(log(p), floor), maximum(log1p(-p), floor)


@triton.jit
def logistic(x):
    """−ln σ(|x|), σ(x), σ(−x), from one exp and one division; ≤ 2.5 ULP each, or 0 where
    subnormal."""
    e = exp_negative(-tl.abs(x))
    tail = log1p_unit(e)
    big = reciprocal(1.0 + e)
    small = e * big
    positive = x >= 0
    return tail, tl.where(positive, big, small), tl.where(positive, small, big)


@triton.jit
def half_phi_expm1(d):
    """½ (e^d − 1 − d) without cancellation, and ½ (e^d − 1), which in float32 are numbers where the
    whole is none; φ ≥ 0; ≤ 2.5 ULP."""
    if d.dtype == tl.float64:
        low: tl.constexpr = -1.0
        high: tl.constexpr = 1.0
        # Σ d^k / k!, up to d^20 / 20! < 1e-18
        c: tl.constexpr = (
            1 / 6,
            1 / 24,
            1 / 120,
            1 / 720,
            1 / 5040,
            1 / 40320,
            1 / 362880,
            1 / 3628800,
            1 / 39916800,
            1 / 479001600,
            1 / 6227020800,
            1 / 87178291200,
            1 / 1307674368000,
            1 / 20922789888000,
            1 / 355687428096000,
            1 / 6402373705728000,
            1 / 121645100408832000,
            1 / 2432902008176640000,
        )
    else:
        low: tl.constexpr = -1.0
        high: tl.constexpr = 2.0
        c: tl.constexpr = (
            0.1666666716337204,
            0.041666675359010696,
            0.008333331905305386,
            0.0013888580724596977,
            0.0001984244299819693,
            2.4841781851137057e-05,
            2.7324401798978215e-06,
            2.607000340049126e-07,
            3.8409130098671085e-08,
        )
    near = (d >= low) & (d <= high)
    dd = d * d
    phi = tl.fma(dd * d, polynomial_pairs(d, c), 0.5 * dd)
    if d.dtype == tl.float64:
        e = 0.5 * tl.exp(d) - 0.5
    else:
        p, bits = exp_factor(d)
        e = scale2(0.5 * p, bits) - 0.5
    return tl.where(near, 0.5 * phi, e - 0.5 * d), tl.where(near, 0.5 * (phi + d), e)


@triton.jit
def sincospi(t):
    """sin(πt), cos(πt) for t in [−1, 1]; float32; absolute error about 1e-7."""
    q, k = round_even(t + t)
    r = tl.fma(q, -0.5, t)  # exact; in [−¼, ¼]
    r2 = r * r
    cs: tl.constexpr = (-5.167707920074463, 2.5497610569000244, -0.5890122056007385)
    cc: tl.constexpr = (
        -4.934802055358887,
        4.058706760406494,
        -1.3350359201431274,
        0.23126092553138733,
    )
    s = r * polynomial(r2, 3.1415927410125732, cs)
    c = polynomial(r2, 1.0, cc)
    odd = (k & 1) == 1  # a quarter turn swaps the two
    sin = int_bits(tl.where(odd, c, s)) ^ ((k & 2) << 30)
    cos = int_bits(tl.where(odd, s, c)) ^ (((k + 1) & 2) << 30)
    return float_bits(sin), float_bits(cos)
