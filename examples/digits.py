"""A small VAE on scikit-learn's handwritten digits (8x8), trained with fastvae on a CPU.

    python examples/digits.py --out vae-digits.png

Prints the ELBO and its two parts per epoch, then the importance-sampled ln p(x), and draws the loss
curve, reconstructions and samples. All figures are nats per digit.

    python examples/digits.py --compare

trains an autoencoder as well and draws the two side by side (compare.py).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fastvae

SIDE = 8
HELD_OUT = 360  # of 1797 digits


class VAE(nn.Module):
    def __init__(self, latents: int, hidden: int = 256) -> None:
        super().__init__()
        pixels = SIDE * SIDE
        # 1437 digits are few: without the dropout the encoder learns them by heart.
        self.encoder = nn.Sequential(nn.Dropout(0.05), *mlp(pixels, hidden, 2 * latents))
        self.decoder = mlp(latents, hidden, pixels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, 64] -> the likelihood's parameter [B, 64] and KL(q(z|x) || p(z)) [B]."""
        z, kl = fastvae.rsample_kl(*self.encode(x))
        return self.decoder(z), kl


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, hidden), nn.GELU()),
        *(nn.Linear(hidden, hidden), nn.GELU()),
        nn.Linear(hidden, outputs),
    )


@dataclass
class Terms:
    """Means per digit, in nats."""

    elbo: float
    reconstruction: float  # E[-ln p(x|z)]
    kl: float

    def __str__(self) -> str:
        parts = f"{self.reconstruction:7.3f} reconstruction + {self.kl:6.3f} KL"
        return f"ELBO {self.elbo:8.3f} = -({parts})"


def train_epoch(
    model: VAE, criterion: fastvae.ELBOLoss, optimizer: torch.optim.Optimizer, x: Tensor, batch: int
) -> Terms:
    model.train()
    total = torch.zeros(2)
    for rows in torch.randperm(len(x)).split(batch):
        recon, kl = model(x[rows])
        loss, log_likelihood, mean_kl = criterion.terms(recon, x[rows], kl=kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += torch.stack([log_likelihood, mean_kl]) * (len(rows) / len(x))
    return to_terms(*total.tolist())


@torch.no_grad()
def evaluate(model: VAE, criterion: fastvae.ELBOLoss, x: Tensor) -> Terms:
    model.eval()
    recon, kl = model(x)
    _, log_likelihood, mean_kl = criterion.terms(recon, x, kl=kl)
    return to_terms(log_likelihood.item(), mean_kl.item())


def to_terms(log_likelihood: float, kl: float) -> Terms:
    return Terms(log_likelihood - kl, -log_likelihood, kl)


@torch.no_grad()
def importance_sampled(
    model: VAE, likelihood: fastvae.likelihoods.Likelihood, x: Tensor, samples: int, chunk: int = 32
) -> tuple[float, float]:
    """The mean ELBO and the mean of ln p(x) = ln mean_k w_k, w_k = p(x|z_k) p(z_k) / q(z_k|x).

    Both from the same weights, so that Jensen's inequality (ELBO <= ln p(x)) holds digit by digit.
    A chunk of digits at a time: the decoder's output is [samples, chunk, 64].
    """
    model.eval()
    elbos, log_ps = [], []
    for part in x.split(chunk):
        mu, logvar = model.encode(part)
        z = fastvae.rsample(mu, logvar, num_samples=samples)  # [K, B, latents]
        log_px = fastvae.log_likelihood(model.decoder(z), part, likelihood)  # [K, B]
        log_pz = -0.5 * z.square()  # ln(2 pi) / 2 is in both densities and cancels
        log_qz = -0.5 * ((z - mu).square() / logvar.exp() + logvar)
        log_w = log_px + (log_pz - log_qz).sum(-1)
        elbos.append(log_w.mean(0))
        log_ps.append(log_w.logsumexp(0) - math.log(samples))
    return torch.cat(elbos).mean().item(), torch.cat(log_ps).mean().item()


def tile(images: Tensor, band: int = 1) -> Tensor:
    """[rows, columns, 64] -> one picture, with a wider gap after each `band` rows."""
    rows, columns = images.shape[:2]
    tops = [row * (SIDE + 1) + row // band * 2 for row in range(rows)]
    picture = torch.full((tops[-1] + SIDE, columns * (SIDE + 1) - 1), torch.nan)
    for top, row in zip(tops, images, strict=True):
        for column, image in enumerate(row):
            left = column * (SIDE + 1)
            picture[top : top + SIDE, left : left + SIDE] = image.view(SIDE, SIDE)
    return picture


def draw(
    path: str, history: list[tuple[Terms, Terms]], log_px: float, pairs: Tensor, samples: Tensor
) -> None:
    """history: training and held out, per epoch. pairs, samples: [rows, columns, 64]."""
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11})
    figure, (curve, left, right) = plt.subplots(
        1, 3, figsize=(13, 4.1), layout="constrained", width_ratios=[1.25, 1, 1]
    )
    epochs = range(1, len(history) + 1)
    for i, (label, color) in enumerate({"training": "#8fa9bf", "held out": "#c0392b"}.items()):
        curve.plot(epochs, [terms[i].elbo for terms in history], label=label, color=color)
    curve.axhline(log_px, color="#2c3e50", ls="--", lw=1, label="ln p(x) of held out, at the end")
    # The first epochs are far below all others and would flatten the rest.
    first = history[len(history) // 20][1].elbo
    curve.set(title="ELBO", xlabel="epoch", ylabel="nats per digit", ylim=(first, None))
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.legend(frameon=False, loc="lower right")
    curve.spines[["top", "right"]].set_visible(False)
    for axes, title, picture in (
        (left, "Held-out digits and reconstructions", tile(pairs, band=2)),
        (right, "Samples from the prior", tile(samples)),
    ):
        axes.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title)
        axes.set_anchor("N")  # the two pictures differ in height: titles in line
        axes.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--likelihood", choices=["bernoulli", "gaussian"], default="gaussian")
    parser.add_argument("--samples", type=int, default=500, help="per digit, to estimate ln p(x)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="with an autoencoder beside it")
    names = ("vae-digits.png", "autoencoder-vs-vae.png")
    parser.add_argument(
        "--out", default=argparse.SUPPRESS, help=f"(default: {names[0]}; with --compare {names[1]})"
    )
    args = parser.parse_args(argv)
    vars(args).setdefault("out", names[args.compare])
    return args


def load(seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out digits, [B, 64] in [0, 1]. The seed holds for all that follows."""
    torch.manual_seed(seed)
    digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16  # [1797, 64]
    digits = digits[torch.randperm(len(digits))]
    return digits[HELD_OUT:], digits[:HELD_OUT]


def family(name: str) -> tuple[fastvae.likelihoods.Likelihood, nn.Module]:
    """The likelihood, and what turns its parameter into pixels."""
    if name == "gaussian":
        return fastvae.likelihoods.Gaussian(logvar="learned"), nn.Identity()
    return fastvae.likelihoods.Bernoulli(), nn.Sigmoid()


def fit(
    model: VAE,
    likelihood: fastvae.likelihoods.Likelihood,
    train: Tensor,
    held_out: Tensor,
    epochs: int,
    batch: int,
) -> Iterator[tuple[Terms, Terms]]:
    """Trains one epoch per step; its terms in training and on held-out digits."""
    criterion = fastvae.ELBOLoss(likelihood)
    # The learned noise level of the pixels is one number: it can move faster than the weights.
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters())},
        {"params": list(likelihood.parameters()), "lr": 2e-2},
    ]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        terms = train_epoch(model, criterion, optimizer, train, batch)
        schedule.step()
        yield terms, evaluate(model, criterion, held_out)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    if args.compare:
        from compare import compare  # beside this file

        return compare(args)
    train, held_out = load(args.seed)
    likelihood, to_pixels = family(args.likelihood)
    model = VAE(args.latents)
    history = []
    progress = tqdm(
        fit(model, likelihood, train, held_out, args.epochs, args.batch_size),
        total=args.epochs,
        unit="epoch",
    )
    for terms, held_out_terms in progress:
        history.append((terms, held_out_terms))
        progress.write(f"{len(history):4d}  {terms}   held-out ELBO {held_out_terms.elbo:8.3f}")

    elbo, log_px = importance_sampled(model, likelihood, held_out, args.samples)
    print(f"held-out ELBO      {elbo:9.3f} nats per digit")
    print(f"held-out ln p(x)   {log_px:9.3f} nats per digit ({args.samples} importance samples)")

    with torch.no_grad():
        shown = held_out[:40].view(4, 10, -1)
        recon = to_pixels(model.decoder(model.encode(shown.flatten(0, 1))[0])).view_as(shown)
        pairs = torch.stack([shown, recon], dim=1).flatten(0, 1)  # rows take turns
        samples = to_pixels(model.decoder(torch.randn(90, args.latents))).view(9, 10, -1)
    draw(args.out, history, log_px, pairs, samples)
    print(f"wrote {args.out}")
    last = history[-1][0]
    return {
        "elbo": elbo,
        "log_px": log_px,
        "first_elbo": history[0][1].elbo,
        "train_elbo": last.elbo,
        "train_reconstruction": last.reconstruction,
        "train_kl": last.kl,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small gain nothing from a second
    main()
