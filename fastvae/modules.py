"""The loss as a module; no maths."""

from torch import Tensor, nn

from fastvae import likelihoods
from fastvae._backends import Prior, Terms, check_backend
from fastvae.functional import Recon, check_beta, check_reduction, elbo_terms
from fastvae.likelihoods import Likelihood


class ELBOLoss(nn.Module):
    """The negative evidence lower bound, drop-in for ``loss(recon, x, mu, logvar)``.

    Args:
        likelihood: a name in ``fastvae.likelihoods.registry`` or an object. A learned scale is a
            parameter of this module: give ``criterion.parameters()`` to the optimizer too.
        beta: factor of the KL (an attribute; change it freely to anneal).
        reduction: "mean" over the batch, "sum", or "none".
        backend: "auto", "cpp", "triton" or "eager".
        inplace_backward: as in `fastvae.elbo_loss`: recon is overwritten by its gradient.

    Example:
        >>> criterion = ELBOLoss("bernoulli")
        >>> z, kl = fastvae.rsample_kl(mu, logvar)
        >>> loss = criterion(decoder(z), x, kl=kl)
    """

    def __init__(
        self,
        likelihood: str | Likelihood = "bernoulli",
        beta: float = 1.0,
        reduction: str = "mean",
        backend: str = "auto",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_beta(beta)
        check_backend(backend)
        self.likelihood = likelihoods.get(likelihood)
        self.beta = beta
        self.reduction = reduction
        self.backend = backend
        self.inplace_backward = inplace_backward

    def forward(
        self,
        recon: Recon,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        prior: Prior | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss, in nats; arguments, shapes and errors as in `fastvae.elbo_loss`."""
        return elbo_terms(
            recon, x, mu, logvar, kl=kl, likelihood=self.likelihood, beta=self.beta,
            reduction=self.reduction, prior=prior, sample_weight=sample_weight, mask=mask,
            inplace_backward=self.inplace_backward, backend=self.backend,
        ).loss  # fmt: skip

    def terms(
        self,
        recon: Recon,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        prior: Prior | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Terms:
        """(loss, log_likelihood, kl), reduced alike; the last two are detached, for logging."""
        return elbo_terms(
            recon, x, mu, logvar, kl=kl, likelihood=self.likelihood, beta=self.beta,
            reduction=self.reduction, prior=prior, sample_weight=sample_weight, mask=mask,
            inplace_backward=self.inplace_backward, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reduction={self.reduction!r}, backend={self.backend!r}"
