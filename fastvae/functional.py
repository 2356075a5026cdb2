"""The public functions: validation, broadcasting, choice of backend; no maths.

Dimension 0 is the batch; all others are event dimensions and are summed. Values are in nats.
float64 is computed and returned in float64; float32, bfloat16 and float16 are computed in float32,
and sums come back in float32. Gradients have the dtype of their input.
"""

import numbers
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastvae import likelihoods
from fastvae._backends import Ops, cpp, select
from fastvae._kl import divergence
from fastvae._latents import (
    AnyPrior,
    Posterior,
    batch_dims_of,
    expand_prior,
    latent,
    sample_dtype,
)
from fastvae._validation import (
    Recon,
    check_batch_dims,
    check_choice,
    check_count,
    check_integers,
    check_mask,
    check_recon,
    check_stream,
    shape,
)
from fastvae.likelihoods import Likelihood


def rsample(
    mu: Posterior,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sample_offset: int = 0,
    sample_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draws z = μ + σ ε, σ = e^(logvar/2), ε ~ N(0, I), differentiable in μ and logvar.

    The reparameterization trick (Kingma & Welling 2014, section 2.4). ε is never stored: it is a
    function of a seed drawn from torch's generator and of the element's index, and backward draws
    it again. It is a float32 number for every dtype.

    Args:
        mu: mean, [B, *event]; or, alone, a distribution that has all: a `DiagonalNormal`, a
            ``torch.distributions.Normal`` or ``Independent`` of one, diffusers'.
        logvar: ln σ², the same shape, dtype and device.
        std, log_std: σ, above 0 (checked on CPU), or ln σ, in place of logvar.
        num_samples: K draws for each row, in a leading dimension.
        generator: source of the seed; torch's default one if left out.
        seed: the seed itself, an int in [0, 2⁶³) or an int64 tensor of one element on mu's device
            (any 64 bits, which nothing waits for); then no generator is touched.
        sample_offset: the row's index in the stream at which this batch starts, so that parts of a
            batch draw as the whole would under one seed.
        sample_index: int64, [B], at least 0 and below 2⁶³ / (num_samples · latents), which is
            checked on CPU: each row's own index in the stream instead, in any order. With `seed`
            (another one for each call of a step), the noise of a sample then depends on the two,
            however the batch is split over ranks or micro-batches.
        backend: "auto", "cpp", "cuda", "triton" or "eager".

    Returns:
        z, [B, *event] or [K, B, *event], in mu's dtype.

    Raises:
        ValueError: shapes or devices differ, not exactly one of logvar, std and log_std,
            num_samples < 1, both generator and seed, both sample_offset and sample_index, unknown
            or unavailable backend.
        TypeError: mu or logvar is not a floating tensor, or their dtypes differ (under autocast
            the wider is taken); another argument has the wrong type.
    """
    common = num_samples is None and generator is None and seed is None and sample_index is None
    common = common and std is None and log_std is None
    if common and backend == "auto" and not is_compiling():
        z = cpp.direct.rsample(mu, logvar, sample_offset)
        if z is not None:
            return z
    mean, logvar, _ = latent(mu, logvar, std, log_std)
    check_stream(mean, num_samples, sample_offset, sample_index)
    ops = select(backend, mean.device)
    key = _seed(ops, mean, generator, seed)
    z = ops.rsample(mean, logvar, key, num_samples, sample_offset, sample_index)
    dtype = sample_dtype(mu, std)
    return z if dtype is None else z.to(dtype)


def rsample_kl(
    mu: Posterior,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    prior: AnyPrior | None = None,
    batch_dims: int | None = None,
    per: str = "sample",
    mask: Tensor | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sample_offset: int = 0,
    sample_index: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`rsample` and `kl_divergence` in one pass over mu and logvar.

    With a `prior`, or a KL that is not summed over all but the batch dimensions, the two are
    computed one after the other. Arguments and errors are theirs.

    Returns:
        z as from `rsample` (the same draws under the same seed), and kl [B] in nats, or as
        `kl_divergence` says. Where the mask is False z is a draw of N(0, 1), without a gradient.
    """
    common = num_samples is None and generator is None and seed is None and sample_index is None
    common = common and std is None and log_std is None
    usual = batch_dims is None or (type(batch_dims) is int and batch_dims == 1)
    if (
        common
        and usual
        and prior is None
        and per == "sample"
        and mask is None
        and backend == "auto"
        and not is_compiling()
    ):
        sample = cpp.direct.rsample_kl(mu, logvar, sample_offset)
        if sample is not None:
            return sample
    mean, logvar, mask = latent(mu, logvar, std, log_std, mask)
    check_stream(mean, num_samples, sample_offset, sample_index)
    batch_dims = _check_sum(mu, mean, batch_dims, per)
    expanded = None if prior is None else expand_prior(prior, mean, mask)
    if mask is not None:  # a KL of 0 to N(0, I)
        mean, logvar = torch.where(mask, mean, 0), torch.where(mask, logvar, 0)
    ops = select(backend, mean.device)
    key = _seed(ops, mean, generator, seed)
    if prior is None and batch_dims == 1 and per == "sample":
        z, kl = ops.rsample_kl(mean, logvar, key, num_samples, sample_offset, sample_index)
    else:
        z = ops.rsample(mean, logvar, key, num_samples, sample_offset, sample_index)
        kl = divergence(ops, mean, logvar, expanded, mask, batch_dims, per)
    dtype = sample_dtype(mu, std)
    return z if dtype is None else z.to(dtype), kl


def kl_divergence(
    mu: Posterior,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    prior: AnyPrior | None = None,
    batch_dims: int | None = None,
    per: str = "sample",
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(N(μ, σ²) ‖ prior) per sample, in nats (Kingma & Welling 2014, appendix B).

    Accurate near the prior too: with lv = ln σ², e^lv − 1 − lv is not computed as that difference.

    Args:
        mu: mean, [B, *event]; or, alone, a distribution, as in `rsample`.
        logvar: ln σ², the same shape, dtype and device.
        std, log_std: σ, above 0 (checked on CPU), or ln σ, in place of logvar.
        prior: (mu, logvar) of a diagonal normal, each a number or a tensor that broadcasts to mu's
            shape; or what has them: a ``torch.distributions.Normal``, a `DiagonalNormal`, a module
            with learned ``mu`` and ``logvar``. N(0, I) if left out. Gradients flow to it.
        batch_dims: how many leading dimensions are not summed over: 2 for a value per sequence and
            step, [B, T, L] to [B, T]; 0 for a variable without a batch, a layer's weights. Those
            of a `DiagonalNormal` or an ``Independent``, else 1, if left out.
        per: "sample"; "dimension" for the mean over the batch dimensions, one value for each
            element of the event; "element" for no sum at all.
        mask: bool, broadcastable to mu. False leaves the element out: value and gradient are 0
            whatever is stored there, and a mean is over those that are kept.
        backend: "auto", "cpp", "cuda", "triton" or "eager".

    Returns:
        kl, [B], of ``batch_dims=2`` [B, T], of 0 []; summed over the event dimensions. Per
        dimension [*event], per element mu's shape.

    Raises:
        ValueError: shapes or devices don't fit, not exactly one of logvar, std and log_std, more
            batch_dims than mu has, unknown `per`, unknown or unavailable backend.
        TypeError: not floating tensors, or dtypes differ (under autocast the widest is taken).
    """
    mean, logvar, mask = latent(mu, logvar, std, log_std, mask)
    batch_dims = _check_sum(mu, mean, batch_dims, per)
    expanded = None if prior is None else expand_prior(prior, mean, mask)
    return divergence(select(backend, mean.device), mean, logvar, expanded, mask, batch_dims, per)


def _check_sum(q: Posterior, mu: Tensor, batch_dims: int | None, per: str) -> int:
    """The batch's dimensions."""
    dims = batch_dims_of(q, batch_dims)
    check_batch_dims(mu, dims)
    check_choice("per", per, ("sample", "dimension", "element"))
    return dims


def log_likelihood(
    recon: Recon,
    x: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """ln p(x | recon) per sample, in nats; its gradient is computed in the same pass.

    Args:
        recon: what the decoder gives: a tensor, or one tensor per parameter of the family. The
            first has shape [B, *event] or [K, B, *event]; the others broadcast to it. x is never
            expanded to K. Of classes there is one dimension more, [B, classes, *event].
        x: targets, [B, *event]; floating, uint8 or bool; of counts and classes any integer.
        likelihood: a name in ``fastvae.likelihoods.registry`` or an object.
        mask: bool, broadcastable to x. False leaves the element out: value and gradient are 0
            whatever is stored there.
        backend: "auto", "cpp", "cuda", "triton" or "eager".

    Returns:
        [B] or [K, B]; summed over the event dimensions.

    Raises:
        ValueError: shapes or devices don't fit; x or probabilities outside the family's domain
            (CPU tensors; elsewhere a check would stall the device); wrong number of parameters;
            unknown likelihood or backend.
        TypeError: wrong types or dtypes.
    """
    family = family_of(likelihood)
    params = check_recon(recon, x, family)
    mask = family.kept(x, check_mask(mask, x))
    return select(backend, x.device).log_likelihood(x, params, family, mask)


_NAMED: dict[str, Likelihood] = {}


def family_of(likelihood: str | Likelihood) -> Likelihood:
    """`likelihoods.get`, but a name's object is made once: a module costs 3 µs."""
    if not isinstance(likelihood, str) or is_compiling():
        return likelihoods.get(likelihood)
    family = _NAMED.get(likelihood)
    if family is None:
        family = _NAMED[likelihood] = likelihoods.get(likelihood)
    return family


def _seed(ops: Ops, mu: Tensor, generator: torch.Generator | None, seed: object) -> Tensor:
    """What the noise is a function of: int64 [1], on mu's device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return ops.draw_seed(mu, generator)
    if generator is not None:
        raise ValueError("give either generator or seed, got both")
    if isinstance(seed, Tensor):
        check_integers("seed", seed, mu)
        if seed.numel() != 1:
            raise ValueError(f"seed must hold one element, got {shape(seed)}")
        return seed
    if not isinstance(seed, (int, torch.SymInt)) and isinstance(seed, numbers.Integral):
        seed = int(seed)  # numpy's
    check_count("seed", seed, 0)
    number = cast(int, seed)
    if number >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {number}")
    return torch.full((1,), number, dtype=torch.int64, device=mu.device)
