"""A training loop with Hugging Face Accelerate.

    accelerate launch examples/accelerate_loop.py --epochs 5

Prints the loss per epoch, in nats per digit.
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.likelihoods import Gaussian


class VAE(nn.Module):
    """Returns the loss: with several processes Accelerate averages the gradients of what it
    prepared, and the learned noise level of the pixels is a parameter of the criterion."""

    def __init__(self, latents: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 2 * latents)
        )
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.GELU(), nn.Linear(hidden, 64))
        self.criterion = fastvae.ELBOLoss(Gaussian(logvar=nn.Parameter(torch.tensor(-2.0))))

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = fastvae.rsample_kl(mu, logvar)
        loss: Tensor = self.criterion(self.decoder(z), x, kl=kl)
        return loss


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate
    )
    set_seed(args.seed)  # the same weights in every process …
    model = VAE()
    set_seed(args.seed, device_specific=True)  # … and other noise
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    digits = TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 16)
    loader = DataLoader(digits, args.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for epoch in range(1, args.epochs + 1):
        total = torch.zeros((), device=accelerator.device)
        for (x,) in loader:
            with accelerator.accumulate(model):
                loss = model(x)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        losses.append(accelerator.reduce(total, "mean").item() / len(loader))
        accelerator.print(f"{epoch:4d}  loss {losses[-1]:9.5f}")
    accelerator.end_training()
    return {"first_loss": losses[0], "loss": losses[-1]}


if __name__ == "__main__":
    main()
