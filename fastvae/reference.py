"""The oracle that the tests compare against: float64, torch.distributions, gradients by autograd.

Nothing in the product imports this file and it shares no formula with the product. It is written
to be read, not to be fast. Inputs of any dtype are upcast to float64, so what it returns is the
exact answer for the given inputs, up to float64 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributions import NegativeBinomial, Normal, Poisson
from torch.nn.functional import logsigmoid, one_hot

Params = Tensor | Sequence[Tensor]
Word = TypeVar("Word", int, Tensor)

# A value inside the domain of every parameter of every family: it stands in for masked elements,
# so that a NaN there can't reach a gradient as 0 * NaN.
_ANY_VALID = 0.5


# ---------------------------------------------------------------- likelihoods, one value an element


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """x ln sigma(l) + (1 - x) ln sigma(-l); continuous x too.

    Not torch.distributions.Bernoulli.log_prob: its (1 - x) l - ln sigma(l) cancels for confident
    predictions (x = 0, l = -33: it gives 0 for -4.7e-15). The last term is zero and makes the
    gradient in x exactly l, which is also the difference of two logarithms that cancel near l = 0.
    """
    fixed = x.detach()
    value = fixed * logsigmoid(logits) + (1 - fixed) * logsigmoid(-logits)
    return value + (x - fixed) * logits


def bernoulli_probs(x: Tensor, probs: Tensor, *, log_min: float = -100.0) -> Tensor:
    """x max(ln p, m) + (1 - x) max(ln(1 - p), m), but the gradient in p sees no clamp: it is
    torch.nn.BCELoss's, (x - p) / max(p (1 - p), 1e-12).

    Written out, as torch's 1e-12 is a float32 number in float64 too: 4e-9 relative error.
    """
    fixed = probs.detach()
    value = x * fixed.log().clamp(min=log_min) + (1 - x) * torch.log1p(-fixed).clamp(min=log_min)
    slope = (x.detach() - fixed) / (fixed * (1 - fixed)).clamp(min=1e-12)
    return value + slope * (probs - fixed)


def gaussian(x: Tensor, mean: Tensor, *, scale: float = 1.0, normalized: bool = True) -> Tensor:
    if normalized:
        return Normal(mean, torch.full_like(mean, scale), validate_args=False).log_prob(x)
    return -((x - mean) ** 2) / (2 * scale**2)


def gaussian_logvar(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return Normal(mean, (logvar / 2).exp(), validate_args=False).log_prob(x)


def poisson(x: Tensor, mean: Tensor) -> Tensor:
    return Poisson(mean, validate_args=False).log_prob(x)


def poisson_log(x: Tensor, log_mean: Tensor) -> Tensor:
    return x * log_mean - log_mean.exp() - torch.lgamma(x + 1)


def negative_binomial(x: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """torch's, whose probability of a success is m / (m + theta)."""
    logits = mean.log() - dispersion.log()
    return NegativeBinomial(dispersion, logits=logits, validate_args=False).log_prob(x)


def zero_inflated_negative_binomial(
    x: Tensor, mean: Tensor, dispersion: Tensor, zero_logits: Tensor
) -> Tensor:
    """ln(pi [x = 0] + (1 - pi) NB(x)), each term by its logarithm."""
    nb = negative_binomial(x, mean, dispersion) + logsigmoid(-zero_logits)
    return torch.where(x == 0, torch.logaddexp(logsigmoid(zero_logits), nb), nb)


def categorical(x: Tensor, logits: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """x [B, *event], logits [rows..., classes, *event]; the gradient by x is 0.

    ln sigma(l_x - ln sum of the others' e^l). Not torch.distributions.Categorical: the gradient of
    its log_softmax is 1 - p, which cancels for confident predictions (l = 30 and 0: 1.3% off).
    """
    dim, classes = -x.dim(), logits.shape[-x.dim()]
    hit = one_hot(x.long(), classes).movedim(-1, 1).bool()
    own = torch.where(hit, logits, 0.0).sum(dim)
    others = logits.masked_fill(hit, -math.inf).logsumexp(dim) if classes > 1 else -math.inf
    value = logsigmoid(own - others) + 0 * x
    if not label_smoothing:
        return value
    return (1 - label_smoothing) * value + label_smoothing * logits.log_softmax(dim).mean(dim)


ORACLES: dict[str, Callable[..., Tensor]] = {
    "bernoulli": bernoulli,
    "bernoulli_probs": bernoulli_probs,
    "gaussian": gaussian,
    "gaussian_logvar": gaussian_logvar,
    "poisson": poisson,
    "poisson_log": poisson_log,
    "negative_binomial": negative_binomial,
    "zero_inflated_negative_binomial": zero_inflated_negative_binomial,
    "categorical": categorical,
}
# Their parameters have a dimension more than x: that of the classes, behind the rows'.
SITES = ("categorical",)


def elementwise(
    x: Tensor,  # [B, *event]
    params: Params,  # each [B, *event] or [K, B, *event]
    likelihood_name: str,
    *,
    mask: Tensor | None = None,
    **options: float,
) -> Tensor:
    """ln p(x | params), one value an element, 0 where mask is False."""
    single = (params,) if isinstance(params, Tensor) else tuple(params)
    tensors = (x.double(), *(p.double() for p in single))
    sites, oracle = likelihood_name in SITES, ORACLES[likelihood_name]
    if not sites:
        tensors = torch.broadcast_tensors(*tensors)
    if mask is None:
        return oracle(*tensors, **options)
    of_params = mask.expand(x.shape).unsqueeze(1) if sites else mask
    filler = torch.tensor(_ANY_VALID, dtype=torch.float64)
    hidden = (torch.where(of_params, t, filler) for t in tensors[1:])
    value = oracle(torch.where(mask, tensors[0], filler), *hidden, **options)
    return torch.where(mask, value, 0.0)


def log_likelihood(
    x: Tensor,
    params: Params,
    likelihood_name: str,
    *,
    mask: Tensor | None = None,
    **options: float,
) -> Tensor:  # [B] or [K, B]
    terms = elementwise(x, params, likelihood_name, mask=mask, **options)
    return sum_event(terms, x.dim() - 1)


def sum_event(terms: Tensor, event_dims: int) -> Tensor:
    """Sums the last event_dims dimensions; none at all where that is 0 (sum(dim=()) sums all)."""
    return terms.sum(dim=tuple(range(-event_dims, 0))) if event_dims else terms


# ------------------------------------------------------------------------------------ KL divergence


def kl_elementwise(
    mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """KL(N(mu, exp(logvar)) || prior), one value an element.

    torch.distributions computes r - 1 - ln r with r = exp(logvar - logvar_p), which cancels near
    the prior: 2e-4 relative error at a difference of 1e-6, in float64. So below a half the variance
    part is its own Taylor series, whose 17 terms reach float64 rounding.
    """
    mu, logvar = mu.double(), logvar.double()
    mu_p, logvar_p = prior if prior is not None else (torch.zeros_like(mu),) * 2
    mu, logvar, mu_p, logvar_p = torch.broadcast_tensors(
        mu, logvar, mu_p.double(), logvar_p.double()
    )
    q = Normal(mu, (logvar / 2).exp(), validate_args=False)
    p = Normal(mu_p, (logvar_p / 2).exp(), validate_args=False)
    far = torch.distributions.kl_divergence(q, p)

    difference = logvar - logvar_p
    close = difference.abs() < 0.5
    d = torch.where(close, difference, 0.0)  # powers of a large difference would overflow
    series = sum((d**n / math.factorial(n) for n in range(2, 19)), start=torch.zeros_like(d))
    near = 0.5 * (series + (mu - mu_p) ** 2 * (-logvar_p).exp())
    return torch.where(close, near, far)


def kl_divergence(
    mu: Tensor,  # [B, *event]
    logvar: Tensor,
    prior: tuple[Tensor, Tensor] | None = None,  # each broadcastable to mu
) -> Tensor:  # [B]
    return sum_event(kl_elementwise(mu, logvar, prior), mu.dim() - 1)


# --------------------------------------------------------------------------------------------- ELBO


def elbo_loss(
    recon: Params,
    x: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    likelihood_name: str = "bernoulli",
    beta: float = 1.0,
    reduction: str = "mean",
    prior: tuple[Tensor, Tensor] | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    **options: float,
) -> Tensor:
    """w_b (beta kl_b - mean_k ll_kb): one value a sample, their sum, or that sum over B."""
    ll = log_likelihood(x, recon, likelihood_name, mask=mask, **options)
    if ll.dim() == 2:
        ll = ll.mean(0)
    if kl is None:
        assert mu is not None and logvar is not None
        kl = kl_divergence(mu, logvar, prior)
    loss = beta * kl.double() - ll
    if sample_weight is not None:
        loss = loss * sample_weight.double()
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / max(len(loss), 1)


# ------------------------------------------------------------------------------------ random stream

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Word], key: Sequence[int]) -> list[Word]:
    """Philox4x32-10 (Salmon et al., 2011). The counter's words are Python ints, or int64 tensors:
    a product that wraps in int64 keeps all 64 bits, and the mask after >> drops the sign."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def box_muller(w_a: Tensor, w_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words (as int64) -> two normals. u is the middle of one of 2^31 equal parts of
    (0, 1), so it is never 0 and never 1."""
    u = (w_a >> 1).double() * 2.0**-31 + 2.0**-32
    signed = torch.where(w_b >= 2**31, w_b - 2**32, w_b)
    angle = math.pi * (signed.double() * 2.0**-31)
    r = (-2 * u.log()).sqrt()
    return r * angle.cos(), r * angle.sin()


def noise_at(seed: int | Tensor, index: Tensor) -> Tensor:
    """The standard normals of these element indices (int64), in float64."""
    seed = int(seed)
    counter = 16 * (index // 64) + index % 16
    which = (index % 64) // 16
    zero = torch.zeros_like(counter)
    words = philox(
        [counter & _WORD, (counter >> 32) & _WORD, zero, zero], [seed & _WORD, (seed >> 32) & _WORD]
    )
    normals = torch.stack([*box_muller(words[0], words[1]), *box_muller(words[2], words[3])])
    return normals.gather(0, which.unsqueeze(0)).squeeze(0)


def radius_at(seed: int | Tensor, index: Tensor) -> Tensor:
    """The radius of the pair that each element belongs to: its partner is 16 elements away."""
    return torch.hypot(noise_at(seed, index), noise_at(seed, index ^ 16))


def noise_index(
    size: Sequence[int],  # [B, *event]
    num_samples: int = 1,
    sample_offset: int = 0,
) -> Tensor:  # [K, B, *event], int64
    batch, latents = size[0], math.prod(size[1:])
    k = torch.arange(num_samples).view(-1, 1, 1)
    b = torch.arange(batch).view(1, -1, 1) + sample_offset
    index = (b * num_samples + k) * latents + torch.arange(latents)
    return index.view(num_samples, *size)


def noise(
    seed: int | Tensor, size: Sequence[int], num_samples: int = 1, sample_offset: int = 0
) -> Tensor:  # [K, *size]
    return noise_at(seed, noise_index(size, num_samples, sample_offset))
