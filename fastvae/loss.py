"""The loss as functions: validation, what may stand in for what, choice of backend; no maths.

Shapes, units and dtypes are functional.py's.
"""

from typing import TypedDict

from torch import Tensor
from torch.compiler import is_compiling
from typing_extensions import Unpack

from fastvae._backends import Terms, cpp, select
from fastvae._backends._common import Beta
from fastvae._backends.eager import combined
from fastvae._kl import FREE_BITS_PER, divergence, floored
from fastvae._latents import AnyPrior, Posterior, check_one_batch_dim, expand_prior, latent
from fastvae._validation import (
    REDUCTIONS,
    Recon,
    check_beta,
    check_choice,
    check_mask,
    check_per_sample,
    check_recon,
    check_weight,
    shape,
)
from fastvae.functional import family_of
from fastvae.likelihoods import Likelihood


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
            Σ_j max(λ, mean_b KL_bj), as published (the free bits of Kingma et al. 2016);
            "element", Σ_j max(λ, KL_bj); "sample", max(λ, KL_b); "batch", max(λ, mean_b KL_b). A
            value of the whole batch is each of its samples'. Only the last two go with `kl`.
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
            and inplace_backward; with inplace_backward, a recon that is a leaf, not contiguous, or
            in memory that another argument uses.
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
    family = family_of(likelihood)
    check_choice("reduction", reduction, REDUCTIONS)
    beta = check_beta(beta)
    floor = check_weight("free_bits", free_bits)
    check_choice("free_bits_per", free_bits_per, FREE_BITS_PER)
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
    if differentiable and inplace_backward:
        raise ValueError("give either differentiable or inplace_backward, got both")
    ops = select(backend, x.device)
    if kl is not None:
        if any(t is not None for t in (mu, logvar, std, log_std, prior, kl_mask)):
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
        mean, logvar, kept = latent(mu, logvar, std, log_std, kl_mask, "kl_mask")
        if mean.shape[0] != x.shape[0] or mean.device != x.device:
            raise ValueError(
                f"mu and x must agree in batch size and device, got {shape(mean)} on "
                f"{mean.device} and {shape(x)} on {x.device}"
            )
        check_one_batch_dim(mu)
        expanded = None if prior is None else expand_prior(prior, mean, kept)
        of_elements = floor > 0 and free_bits_per in ("dimension", "element")
        per = "element" if of_elements else "sample"
        kl = divergence(ops, mean, logvar, expanded, kept, 1, per)
        kl = floored(kl, floor, free_bits_per, kept)
    kl = kl.expand(x.shape[:1]) if kl.dim() == 0 else kl
    if differentiable:
        rows = ops.log_likelihood(x, params, family, mask)
        return combined(rows, kl, weight, beta, reduction), rows.detach(), kl
    terms, rows = ops.elbo(x, params, kl, family, mask, weight, beta, reduction, inplace_backward)
    return terms, rows, kl
