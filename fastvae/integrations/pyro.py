"""The latent as a distribution of Pyro's: ``pyro.sample("z", DiagonalNormal(mu, logvar))``."""

from pyro.distributions.torch_distribution import TorchDistributionMixin

from fastvae import distributions

__all__ = ["DiagonalNormal"]


class DiagonalNormal(distributions.DiagonalNormal, TorchDistributionMixin):
    """`fastvae.DiagonalNormal` with what ``pyro.sample`` asks of a distribution.

    The batch, one dimension unless ``batch_dims`` says otherwise, belongs in plates; all others are
    the event: no ``to_event``. ``TraceMeanField_ELBO`` takes its KL from the fused kernel.
    """
