"""The public functions: validation, broadcasting, choice of backend; no maths.

Dimension 0 is the batch; all others are event dimensions and are summed. Values are in nats.
float64 is computed and returned in float64; float32, bfloat16 and float16 are computed in float32,
and sums come back in float32. Gradients have the dtype of their input.
"""

import numbers
from typing import TypedDict, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from typing_extensions import Unpack

from fastvae import likelihoods
from fastvae._backends import Ops, Terms, cpp, select
from fastvae._backends._common import Beta
from fastvae._backends.eager import combined
from fastvae._kl import FREE_BITS_PER, divergence, floored
from fastvae._latents import AnyPrior, Posterior, expand_prior, latent
from fastvae._validation import (
    REDUCTIONS,
    Recon,
    check_batch_dims,
    check_beta,
    check_choice,
    check_count,
    check_integers,
    check_mask,
    check_per_sample,
    check_recon,
    check_stream,
    check_weight,
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
    mean, logvar = latent(mu, logvar, std, log_std)
    check_stream(mean, num_samples, sample_offset, sample_index)
    ops = select(backend, mean.device)
    key = _seed(ops, mean, generator, seed)
    z = ops.rsample(mean, logvar, key, num_samples, sample_offset, sample_index)
    return z if std is None else z.to(_dtype(mu))


def rsample_kl(
    mu: Posterior,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    prior: AnyPrior | None = None,
    batch_dims: int = 1,
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
    plain = prior is None and type(batch_dims) is int and batch_dims == 1 and per == "sample"
    if common and plain and mask is None and backend == "auto" and not is_compiling():
        sample = cpp.direct.rsample_kl(mu, logvar, sample_offset)
        if sample is not None:
            return sample
    mean, logvar = latent(mu, logvar, std, log_std)
    check_stream(mean, num_samples, sample_offset, sample_index)
    _check_sum(mean, batch_dims, per)
    expanded = None if prior is None else expand_prior(prior, mean)
    if (mask := check_mask(mask, mean, of="mu")) is not None:  # a KL of 0 to N(0, I)
        mean, logvar = torch.where(mask, mean, 0), torch.where(mask, logvar, 0)
    ops = select(backend, mean.device)
    key = _seed(ops, mean, generator, seed)
    if plain:
        z, kl = ops.rsample_kl(mean, logvar, key, num_samples, sample_offset, sample_index)
    else:
        z = ops.rsample(mean, logvar, key, num_samples, sample_offset, sample_index)
        kl = divergence(ops, mean, logvar, expanded, mask, batch_dims, per)
    return z if std is None else z.to(_dtype(mu)), kl


def kl_divergence(
    mu: Posterior,
    logvar: Tensor | None = None,
    *,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    prior: AnyPrior | None = None,
    batch_dims: int = 1,
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
            step, [B, T, L] to [B, T]; 0 for a variable without a batch, a layer's weights.
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
    mean, logvar = latent(mu, logvar, std, log_std)
    _check_sum(mean, batch_dims, per)
    expanded = None if prior is None else expand_prior(prior, mean)
    mask = check_mask(mask, mean, of="mu")
    return divergence(select(backend, mean.device), mean, logvar, expanded, mask, batch_dims, per)


def _check_sum(mu: Tensor, batch_dims: int, per: str) -> None:
    check_batch_dims(mu, batch_dims)
    check_choice("per", per, ("sample", "dimension", "element"))


def _dtype(mu: Posterior) -> torch.dtype:
    """Of a mu that came with a std: a tensor's."""
    return cast(Tensor, mu).dtype


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
    family = _family(likelihood)
    params = check_recon(recon, x, family)
    mask = family.kept(x, check_mask(mask, x))
    return select(backend, x.device).log_likelihood(x, params, family, mask)


class CallOptions(TypedDict, total=False):
    """What a call of the loss may have besides recon, x, mu and logvar: `elbo_loss` says what."""

    kl: Tensor | None
    std: Tensor | None
    log_std: Tensor | None
    prior: AnyPrior | None
    kl_mask: Tensor | None
    sample_weight: Tensor | None
    mask: Tensor | None
    differentiable: bool


class LossOptions(CallOptions, total=False):
    """And what a module holds."""

    likelihood: str | Likelihood
    beta: Beta
    free_bits: float
    free_bits_per: str
    reduction: str
    inplace_backward: bool
    backend: str


def elbo_loss(
    recon: Recon,
    x: Tensor,
    mu: Posterior | None = None,
    logvar: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The negative evidence lower bound, in nats: what a VAE minimizes.

    Per sample, w_b (β KL_b − mean over K of ln p(x_b | recon_kb)); with β = 1 the negative ELBO
    (Kingma & Welling 2014, equation 7), otherwise the β-VAE objective (Higgins et al. 2017,
    equation 4).

    Args:
        recon: the decoder's output, as in `log_likelihood`.
        x: targets, [B, *event].
        mu, logvar: the encoder's output, [B, *latent]; or give `kl` instead. std, log_std, and a
            distribution for mu, as in `rsample`.
        kl: one value per sample, [B], as from `rsample_kl`; any estimate will do.
        likelihood: a name or an object; "bernoulli" if left out.
        beta: factor of the KL, ≥ 0, 1 if left out: a number, numpy's too, or a floating tensor of
            one element, to which a gradient flows. The number 0 leaves the KL out, be it infinite.
        reduction: "mean" over the batch, the default, "sum", or "none" for one value per sample. An
            empty batch gives 0.
        free_bits: λ ≥ 0, in nats: what of the KL lies below gives no gradient, so that latents
            don't collapse; 0 if left out.
        free_bits_per: what λ bounds (b counts samples, j latents): "dimension", the default,
            Σ_j max(λ, mean_b KL_bj), as published (Kingma et al. 2016, equation 15); "element",
            Σ_j max(λ, KL_bj); "sample", max(λ, KL_b); "batch", max(λ, mean_b KL_b). A value of the
            whole batch is each of its samples'. Only the last two go with `kl`.
        prior: as in `kl_divergence`; only together with mu and logvar.
        kl_mask: the mask of `kl_divergence`, bool, broadcastable to mu; only together with it.
        sample_weight: w, [B], floating; gradients flow to it. "mean" stays the plain mean of the
            weighted values.
        mask: as in `log_likelihood`; it concerns the reconstruction alone. A padded sequence wants
            both masks.
        differentiable: of the terms, whether all three have a graph, as adaptive weights between
            the terms need (the GAN of latent diffusion); else the loss alone has.
        inplace_backward: let the gradient overwrite recon, so that the loss takes no memory of the
            reconstruction's size. Only for a recon that nobody reads afterwards: it holds its
            gradient once the loss is computed, and an op that saved it for its own backward (a
            final sigmoid or tanh) makes autograd raise. Nothing is overwritten under no_grad, and
            the option has no effect under torch.compile and torch.func, in the eager backend, or
            for float16, whose gradient is not stored.
        backend: "auto", "cpp", "cuda", "triton" or "eager".

    Returns:
        The loss: a scalar, or [B].

    Raises:
        ValueError, TypeError: as `log_likelihood` and `kl_divergence`; also for neither or both of
            kl and (mu, logvar), an unknown reduction or free_bits_per, a beta or free_bits that is
            not finite and ≥ 0, free bits per dimension or element of a `kl`, both differentiable
            and inplace_backward; with
            inplace_backward, a recon that is a leaf, not contiguous, or in memory that another
            argument uses.
    """
    return evaluate(recon, x, mu, logvar, **options)[0].loss


def elbo_terms(
    recon: Recon,
    x: Tensor,
    mu: Posterior | None = None,
    logvar: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Terms:
    """`elbo_loss` together with its parts, from the same pass.

    Returns:
        (loss, log_likelihood, kl), all reduced alike, so that loss = beta · kl − log_likelihood;
        the last two are detached, for logging, unless ``differentiable=True``.
    """
    return evaluate(recon, x, mu, logvar, **options)[0]


def evaluate(
    recon: Recon,
    x: Tensor,
    mu: Posterior | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    std: Tensor | None = None,
    log_std: Tensor | None = None,
    likelihood: str | Likelihood = "bernoulli",
    beta: Beta = 1.0,
    free_bits: float = 0.0,
    free_bits_per: str = "dimension",
    reduction: str = "mean",
    prior: AnyPrior | None = None,
    kl_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    differentiable: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Terms, Tensor, Tensor]:
    """`elbo_terms`, and each row's log-likelihood ([B] or [K, B], detached) and KL ([B])."""
    family = _family(likelihood)
    check_choice("reduction", reduction, REDUCTIONS)
    beta = check_beta(beta)
    floor = check_weight("free_bits", free_bits)
    common = mu is None and logvar is None and std is None and log_std is None and prior is None
    common = common and mask is None and kl_mask is None and floor == 0 and not differentiable
    common = common and sample_weight is None and not inplace_backward and backend == "auto"
    common = common and type(beta) is float
    if common and family.as_given and not is_compiling():
        terms = cpp.direct.elbo(x, recon, kl, family.family, family.options, beta, reduction)
        if terms is not None:
            assert kl is not None
            return Terms(*terms[:3]), terms[3], kl
    params = check_recon(recon, x, family)
    mask = family.kept(x, check_mask(mask, x))
    weight = check_per_sample("sample_weight", sample_weight, x)
    check_choice("free_bits_per", free_bits_per, FREE_BITS_PER)
    ops = select(backend, x.device)
    if kl is not None:
        beside = {"mu": mu, "logvar": logvar, "std": std, "log_std": log_std, "prior": prior}
        if any(t is not None for t in (*beside.values(), kl_mask)):
            raise ValueError("give either kl or mu, logvar (and prior, kl_mask), got both")
        kl = check_per_sample("kl", kl, x)
        assert kl is not None
        if floor > 0 and free_bits_per in ("dimension", "element"):
            raise ValueError(
                f"free_bits per {free_bits_per} need mu and logvar, got kl, which is one value "
                "per sample"
            )
        kl = floored(kl, floor, free_bits_per)
    else:
        if mu is None:
            given = "logvar" if logvar is not None else "none of them"
            raise ValueError(f"give mu and logvar, or kl, got {given}")
        mean, logvar = latent(mu, logvar, std, log_std)
        if mean.shape[0] != x.shape[0] or mean.device != x.device:
            raise ValueError(
                f"mu and x must agree in batch size and device, got {shape(mean)} on "
                f"{mean.device} and {shape(x)} on {x.device}"
            )
        expanded = None if prior is None else expand_prior(prior, mean)
        kept = check_mask(kl_mask, mean, "kl_mask", "mu")
        per = free_bits_per if floor > 0 and free_bits_per != "batch" else "sample"
        kl = divergence(ops, mean, logvar, expanded, kept, 1, per)
        kl = floored(kl, floor, free_bits_per, kept)
    kl = kl.expand(x.shape[:1]) if kl.dim() == 0 else kl
    if differentiable:
        if inplace_backward:
            raise ValueError("give either differentiable or inplace_backward, got both")
        rows = ops.log_likelihood(x, params, family, mask)
        return combined(rows, kl, weight, beta, reduction), rows.detach(), kl
    terms, rows = ops.elbo(x, params, kl, family, mask, weight, beta, reduction, inplace_backward)
    return terms, rows, kl


_NAMED: dict[str, Likelihood] = {}


def _family(likelihood: str | Likelihood) -> Likelihood:
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
