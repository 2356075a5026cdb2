"""Bernoulli log-likelihoods; csrc/formulas/bernoulli.h in Triton."""

import triton
import triton.language as tl

from fastvae._triton.math import floored_logs, logistic, maximum


@triton.jit
def bernoulli(inputs, options):
    """ln p(x | l) = x ln σ(l) + (1 − x) ln σ(−l) = (x l − max(l, 0)) + ln σ(|l|).

    The fma has one rounding, and both terms one sign: nothing cancels.
    """
    x, logits = inputs
    tail, p, q = logistic(logits)
    value = tl.fma(x, logits, -maximum(logits, 0.0)) - tail
    return value, (logits, x * q - (1.0 - x) * p)


@triton.jit
def bernoulli_probs(inputs, options):
    """ln p(x | p) = x max(ln p, m) + (1 − x) max(ln(1 − p), m); BCELoss's gradient."""
    x, p = inputs
    (log_min,) = options
    log_p, log_q = floored_logs(p, log_min)
    variance = maximum(p * (1.0 - p), 1e-12)
    return x * log_p + (1.0 - x) * log_q, (log_p - log_q, (x - p) / variance)
