"""The loss as a module; no maths."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastvae import likelihoods
from fastvae._backends import Terms, check_backend
from fastvae._backends._common import Beta, in_transform
from fastvae._kl import FREE_BITS_PER
from fastvae._latents import Posterior
from fastvae._validation import REDUCTIONS, Recon, check_beta, check_choice, check_weight
from fastvae.diagnostics import NonFinite
from fastvae.likelihoods import Likelihood
from fastvae.loss import CallOptions, evaluate


class ELBOLoss(nn.Module):
    """The negative evidence lower bound, drop-in for ``loss(recon, x, mu, logvar)``.

    Args:
        likelihood: a name in ``fastvae.likelihoods.registry`` or an object. A learned scale is a
            parameter of this module: give ``criterion.parameters()`` to the optimizer too.
        beta: factor of the KL, as in `fastvae.elbo_loss`; an attribute, to change freely. A number
            becomes a float, a tensor a buffer, an ``nn.Parameter`` one of the module's parameters:
            both move with it and are part of its state. What an optimizer could make negative wants
            a softplus; after the meta device and ``to_empty`` assign it again.
        reduction: "mean" over the batch, "sum", or "none".
        free_bits, free_bits_per: as in `fastvae.elbo_loss`; attributes, to change freely.
        backend: "auto", "cpp", "cuda", "triton" or "eager".
        inplace_backward: as in `fastvae.elbo_loss`: recon is overwritten by its gradient.
        track_nonfinite: count rows that are not finite, on the device, for `check`: one small
            operator more per call on CPU, about twenty on a GPU.

    Examples:
        >>> criterion = ELBOLoss("bernoulli")
        >>> z, kl = fastvae.rsample_kl(mu, logvar)
        >>> loss = criterion(decoder(z), x, kl=kl)
    """

    # Of a module that an older version has pickled.
    free_bits: float = 0.0
    free_bits_per: str = "dimension"

    def __init__(
        self,
        likelihood: str | Likelihood = "bernoulli",
        beta: Beta = 1.0,
        reduction: str = "mean",
        backend: str = "auto",
        inplace_backward: bool = False,
        track_nonfinite: bool = False,
        free_bits: float = 0.0,
        free_bits_per: str = "dimension",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("free_bits_per", free_bits_per, FREE_BITS_PER)
        check_backend(backend)
        self.likelihood = likelihoods.get(likelihood)
        self.beta: Beta
        self.beta = beta  # checked by __setattr__
        self.reduction = reduction
        self.backend = backend
        self.inplace_backward = inplace_backward
        self.track_nonfinite = track_nonfinite
        self.free_bits = check_weight("free_bits", free_bits)
        self.free_bits_per = free_bits_per
        # By device. Not a buffer: DDP would overwrite each rank's own by the first rank's.
        cpu = torch.device("cpu")
        self._nonfinite = {cpu: NonFinite(cpu)} if track_nonfinite else {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "beta":
            value = check_beta(value)
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            self.__dict__.pop(name, None)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
                return
        super().__setattr__(name, value)

    def forward(
        self,
        recon: Recon,
        x: Tensor,
        mu: Posterior | None = None,
        logvar: Tensor | None = None,
        *,
        return_terms: bool = False,
        **options: Unpack[CallOptions],
    ) -> Tensor | Terms:
        """The loss, in nats; arguments, shapes and errors as in `fastvae.elbo_loss`.

        With ``return_terms=True`` (loss, log_likelihood, kl), reduced alike; the last two are
        detached, for logging, unless ``differentiable=True``.
        """
        terms, rows, kl_rows = evaluate(
            recon, x, mu, logvar, likelihood=self.likelihood, beta=self.beta,
            reduction=self.reduction, inplace_backward=self.inplace_backward,
            backend=self.backend, free_bits=self.free_bits, free_bits_per=self.free_bits_per,
            **options,
        )  # fmt: skip
        if self.track_nonfinite and not in_transform() and rows.device.type != "meta":
            counter = self._nonfinite.get(rows.device)
            if counter is None:
                counter = self._nonfinite[rows.device] = NonFinite(rows.device)
            counter.add(rows, kl_rows, options.get("sample_weight"), self.backend)
        return terms if return_terms else terms.loss

    def terms(
        self,
        recon: Recon,
        x: Tensor,
        mu: Posterior | None = None,
        logvar: Tensor | None = None,
        **options: Unpack[CallOptions],
    ) -> Terms:
        """The module called with ``return_terms=True``: hooks fire, as those of FSDP2 do.

        Of a module that DDP or torch.compile has wrapped, call the wrapper so instead.
        """
        return cast(Terms, self(recon, x, mu, logvar, **options, return_terms=True))

    def check(self) -> None:
        """Raises if a log-likelihood, KL or sample_weight was not finite since the last check; the
        one place that waits for the device.

        Calls inside a torch.func transform are not counted; a checkpointed one counts twice.

        Raises:
            FloatingPointError: names each of them, how many rows, and the first call (from 0,
                since the last check) and row.
            RuntimeError: the loss was made without ``track_nonfinite=True``.
        """
        if not self.track_nonfinite:
            raise RuntimeError("check() needs ELBOLoss(track_nonfinite=True)")
        found = [line for counter in self._nonfinite.values() for line in counter.report()]
        if found:
            raise FloatingPointError(f"not finite: {'; '.join(found)}")

    def extra_repr(self) -> str:
        beta = self.beta if isinstance(self.beta, float) else "tensor"
        free = f", free_bits={self.free_bits} per {self.free_bits_per}" if self.free_bits else ""
        return f"beta={beta}, reduction={self.reduction!r}, backend={self.backend!r}{free}"
