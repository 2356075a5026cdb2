"""An autoencoder and a VAE side by side: `python examples/digits.py --compare`.

The same layers, digits, likelihood and training. The autoencoder decodes z = mu and has no KL:
nothing asks that its codes be distributed as N(0, I), where the samples are drawn.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from digits import VAE, Terms, family, fit, load, tile
from torch import Tensor, nn
from tqdm import tqdm

ROWS, COLUMNS = 6, 10  # of each picture
TITLES = ("Held-out digits and reconstructions", "Decoded draws of N(0, I)", "Between two codes")


class Autoencoder(VAE):
    """Half the encoder's output, logvar, goes unused."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, _ = self.encode(x)
        return self.decoder(mu), torch.zeros(len(x))


def nearest(images: Tensor, others: Tensor) -> float:
    """The Euclidean distance from an image [64] to the nearest of the others; mean."""
    return torch.cdist(images, others).min(dim=1).values.mean().item()


@torch.no_grad()
def measure(
    model: VAE, to_pixels: nn.Module, train: Tensor, held_out: Tensor
) -> tuple[dict[str, float], list[Tensor]]:
    """Figures, and three pictures: [ROWS, COLUMNS, 64] each."""
    model.eval()
    codes, _ = model.encode(held_out)
    recon = to_pixels(model.decoder(codes))
    samples = to_pixels(model.decoder(torch.randn(len(train), codes.shape[1])))
    first, last = codes.chunk(2)
    steps = torch.linspace(0, 1, COLUMNS)[:, None]
    between = to_pixels(model.decoder(torch.lerp(first[:ROWS, None], last[:ROWS, None], steps)))
    halfway = to_pixels(model.decoder((first + last) / 2))
    figures = {
        "pixel_error": (recon - held_out).square().mean().sqrt().item(),
        "sample_distance": nearest(samples, train),
        "digit_distance": nearest(held_out, samples),
        "halfway_distance": nearest(halfway, train),
    }
    pairs = torch.stack([t[: ROWS // 2 * COLUMNS] for t in (held_out, recon)])
    pairs = pairs.view(2, -1, COLUMNS, pairs.shape[-1]).transpose(0, 1).flatten(0, 1)
    return figures, [pairs, samples[: ROWS * COLUMNS].view(ROWS, COLUMNS, -1), between]


def caption(name: str, terms: Terms, found: dict[str, float]) -> list[str]:
    """What stands beneath each picture."""
    bound = f"KL {terms.kl:.2f}, ELBO {terms.elbo:.2f}" if name == "VAE" else "no KL, no ELBO"
    return [
        f"reconstruction {terms.reconstruction:.2f} nats, {bound}\n"
        f"rms error of a pixel {found['pixel_error']:.3f}",
        f"from a sample to the nearest training digit {found['sample_distance']:.2f}\n"
        f"from a held-out digit to the nearest sample {found['digit_distance']:.2f}",
        f"from halfway to the nearest training digit {found['halfway_distance']:.2f}",
    ]


def draw(path: str, rows: dict[str, tuple[list[str], list[Tensor]]], note: str) -> None:
    """rows: by model, its captions and pictures."""
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 12})
    spacing = {"wspace": 0.05, "hspace": 0.05}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained", gridspec_kw=spacing)
    for line, (name, (captions, pictures)) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=13)
        bands = (2, ROWS, ROWS)  # a reconstruction belongs to the digit above it
        for cell, text, picture, band in zip(line, captions, pictures, bands, strict=True):
            cell.imshow(tile(picture, band).numpy(), cmap="gray_r", vmin=0, vmax=1)
            cell.set_anchor("N")
            cell.set(xticks=[], yticks=[], xlabel=text)
            cell.spines[:].set_visible(False)
    for cell, title in zip(axes[0], TITLES, strict=True):
        cell.set_title(title)
    figure.supxlabel(note, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(args: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    rows = {}
    for name, kind in {"VAE": VAE, "autoencoder": Autoencoder}.items():
        train, held_out = load(args.seed)  # seeds too: the VAE is that of the run without --compare
        likelihood, to_pixels = family(args.likelihood)
        model = kind(args.latents)
        epochs = fit(model, likelihood, train, held_out, args.epochs, args.batch_size)
        *_, (_, terms) = tqdm(epochs, name, total=args.epochs, unit="epoch")
        found, pictures = measure(model, to_pixels, train, held_out)
        found |= {"reconstruction": terms.reconstruction, "kl": terms.kl}
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        captions = caption(name, terms, found)
        rows[name] = captions, pictures
        print(f"{name}, held out", *"\n".join(captions).splitlines(), sep="\n    ")
    figures["distance"] = nearest(held_out, train)
    note = f"from a held-out digit to the nearest training digit {figures['distance']:.2f}"
    print(note)
    draw(args.out, dict(reversed(rows.items())), note)
    print(f"wrote {args.out}")
    return figures
