"""A LightningModule whose loss is fastvae's.

    python examples/lightning_module.py --epochs 5

Prints the held-out loss and its two parts, in nats per digit.
"""

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastvae
from fastvae.likelihoods import Gaussian


class VAE(L.LightningModule):
    def __init__(self, latents: int = 8, hidden: int = 128, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 2 * latents)
        )
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.GELU(), nn.Linear(hidden, 64))
        # A submodule: its learned noise level is among self.parameters().
        self.criterion = fastvae.ELBOLoss(Gaussian(logvar=nn.Parameter(torch.tensor(-2.0))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def step(self, batch: list[Tensor], stage: str) -> Tensor:
        (x,) = batch
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = fastvae.rsample_kl(mu, logvar)
        loss, log_likelihood, kl = self.criterion.terms(self.decoder(z), x, kl=kl)
        terms = {"loss": loss, "reconstruction": -log_likelihood, "kl": kl}
        self.log_dict(
            {f"{stage}_{name}": value for name, value in terms.items()},
            on_step=False,
            on_epoch=True,
            batch_size=len(x),  # the mean over the epoch is then one over digits
        )
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="32-true", help="or bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    L.seed_everything(args.seed, verbose=False)
    digits = TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 16)
    train, held_out = random_split(digits, [0.8, 0.2])
    model = VAE()
    trainer = L.Trainer(
        accelerator="cpu",
        precision=args.precision,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        model,
        DataLoader(train, args.batch_size, shuffle=True),
        DataLoader(held_out, args.batch_size),
    )
    figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
    print(figures)
    return figures


if __name__ == "__main__":
    main()
