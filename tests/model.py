"""A small VAE whose forward pass is the loss, for the tests of what is around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import fastvae


class VAE(nn.Module):
    """12 pixels, 5 latents."""

    def __init__(self, likelihood: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 10), nn.Linear(5, 12)
        self.criterion = fastvae.ELBOLoss(likelihood)

    def forward(self, x: Tensor, **noise: Any) -> Tensor:
        """`noise`: rsample_kl's own options."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = fastvae.rsample_kl(mu, logvar, **noise)
        loss: Tensor = self.criterion(self.decoder(z), x, kl=kl)
        return loss
