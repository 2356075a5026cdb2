"""Bernoulli log-likelihoods; csrc/formulas/bernoulli.h in Triton."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter asks for it)

from fastvae._triton.math import divide, floored_logs, logistic, maximum


@triton.jit
def bernoulli(inputs, constants):
    """ln p(x | l) = x ln σ(l) + (1 − x) ln σ(−l)."""
    x, logits = inputs
    not_x = 1.0 - x
    log_p, log_q, p, q = logistic(logits)
    return x * log_p + not_x * log_q, (logits, x * q - not_x * p)


@triton.jit
def bernoulli_probs(inputs, constants):
    """ln p(x | p) = x max(ln p, m) + (1 − x) max(ln(1 − p), m); BCELoss's gradient."""
    x, p = inputs
    (log_min,) = constants
    log_p, log_q = floored_logs(p, log_min)
    variance = maximum(p * (1.0 - p), 1e-12)
    return x * log_p + (1.0 - x) * log_q, (log_p - log_q, divide(x - p, variance))
