"""Which likelihood for counts? One VAE with four families, on the words of Python's own source.

    python examples/counts.py --plot counts.png

A document is a file of the standard library; what is counted are the most frequent words. Prints
each family's ln p(x) of held-out files, given their lengths, in nats per file, and the share of
zeros in files drawn from it. --plot draws the words' variances, in the files and in drawn ones, and
the training.
"""

import argparse
import copy
import math
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.special import log_ndtr
from tqdm import tqdm

import fastvae
from fastvae import likelihoods

WORD = re.compile(r"[^\W\d]\w*")
# Tests, installed packages, tables that a program wrote, and how this machine's Python was built.
SKIPPED = re.compile(
    r"(^|/)(tests?/|idle_test/|(site|dist)-packages/|encodings/|pydoc_data/|config-|_sysconfigdata)"
)
FEWEST = 100  # words that a file must have


@dataclass
class Files:
    x: Tensor  # [B, words]
    size: Tensor  # [B]: how many of these words a file has, over the mean of that

    def __getitem__(self, rows: slice | Tensor) -> "Files":
        return Files(self.x[rows], self.size[rows])


def load(words: int) -> tuple[Files, Files, Files]:
    """Files to train on (70%), to stop by (10%), and held out. The first choose the words."""
    root = Path(sysconfig.get_path("stdlib"))
    counts = [
        Counter(WORD.findall(path.read_text(encoding="utf-8", errors="replace")))
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED.search(path.relative_to(root).as_posix())
    ]
    counts = [count for count in counts if count.total() >= FEWEST]
    counts = [counts[i] for i in torch.randperm(len(counts)).tolist()]
    first, second = len(counts) * 7 // 10, len(counts) * 8 // 10
    frequent = [word for word, _ in sum(counts[:first], Counter[str]()).most_common(words)]
    x = torch.tensor([[float(count[word]) for word in frequent] for count in counts])
    files = Files(x, x.sum(1) / x.sum(1).mean())
    return files[:first], files[first:second], files[second:]


class Poisson(nn.Module):
    """Counts of mean size · rate. The other families override what they do otherwise."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.likelihood: likelihoods.Likelihood = likelihoods.Poisson(size_factor=True)

    def recon(self, rate: Tensor, size: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the likelihood takes. rate: [B, words] or [K, B, words], size: [B]."""
        return rate, size

    def target(self, x: Tensor) -> Tensor:
        return x

    def log_prob(self, rate: Tensor, files: Files) -> Tensor:
        """ln P(x) of a file's counts, [B] or [K, B]."""
        return fastvae.log_likelihood(self.recon(rate, files.size), files.x, self.likelihood)

    def sample(self, rate: Tensor, size: Tensor) -> Tensor:
        return torch.poisson(size[:, None] * rate)


class NegativeBinomial(Poisson):
    """With a dispersion for each word."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.log_dispersion = nn.Parameter(torch.zeros(words))
        self.likelihood = likelihoods.NegativeBinomial(
            log_dispersion=self.log_dispersion, size_factor=True
        )

    def sample(self, rate: Tensor, size: Tensor) -> Tensor:
        """Poisson's, the rate multiplied by a gamma variate of mean 1 and variance 1 / θ."""
        theta = self.log_dispersion.exp().expand_as(rate)
        return super().sample(torch.distributions.Gamma(theta, theta).sample() * rate, size)


class ZeroInflated(NegativeBinomial):
    """With a probability of an additional zero for each word as well."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.zero_logits = nn.Parameter(torch.full((words,), -2.0))
        self.likelihood = likelihoods.ZeroInflatedNegativeBinomial(
            log_dispersion=self.log_dispersion, size_factor=True
        )

    def recon(self, rate: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        return rate, self.zero_logits, size

    def sample(self, rate: Tensor, size: Tensor) -> Tensor:
        return super().sample(rate, size) * (torch.rand_like(rate) > self.zero_logits.sigmoid())


class Gaussian(Poisson):
    """On log1p(x), with a variance for each word: size · rate is the median of x."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.logvar = nn.Parameter(torch.zeros(words))
        self.likelihood = likelihoods.Gaussian(logvar=self.logvar)

    def recon(self, rate: Tensor, size: Tensor) -> Tensor:
        return (size[:, None] * rate).log1p()

    def target(self, x: Tensor) -> Tensor:
        return x.log1p()

    def log_prob(self, rate: Tensor, files: Files) -> Tensor:
        return log_mass(files.x, self.recon(rate, files.size), self.logvar).sum(-1)

    def sample(self, rate: Tensor, size: Tensor) -> Tensor:
        mean = self.recon(rate, size)
        y = mean + (self.logvar / 2).exp() * torch.randn_like(mean)
        return y.expm1().round().clamp(min=0)


def log_mass(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """ln P(x) of a count whose log1p is normal, per element, in float64."""
    # The normal's density at log1p(x) is no probability of x, and not to be compared with those of
    # the other families. The count x gets what rounds to it: the normal's mass from log1p(x − ½) to
    # log1p(x + ½), and from −∞ where x = 0. These intervals cover the line: the masses sum to 1.
    x, mean, std = x.double(), mean.double(), (logvar.double() / 2).exp()
    below = torch.where(x > 0, (x - 0.5).clamp(min=0).log1p(), -math.inf)
    low, high = (below - mean) / std, ((x + 0.5).log1p() - mean) / std
    # Far to the right of the mean both cdfs round to 1. Its mirror image has the same mass.
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    return log_ndtr(high) + torch.log1p(-(log_ndtr(low) - log_ndtr(high)).exp())


FAMILIES = {
    "Gaussian on log1p(x)": Gaussian,
    "Poisson": Poisson,
    "negative binomial": NegativeBinomial,
    "zero-inflated": ZeroInflated,
}
COLORS = dict(zip(FAMILIES, ("#5d8aa8", "#2c3e50", "#c0392b", "#d9a441"), strict=True))


class VAE(nn.Module):
    """The same for every family: the decoder gives the words' rates in a file of size 1."""

    def __init__(self, family: Poisson, train: Files, latents: int, hidden: int = 128) -> None:
        super().__init__()
        words = train.x.shape[1]
        self.family = family
        # The files are few: without the dropout the encoder learns them by heart.
        self.encoder = nn.Sequential(
            *(nn.Dropout(0.3), nn.Linear(words, hidden), nn.GELU()),
            nn.Linear(hidden, 2 * latents),
        )
        log_rates = nn.Linear(hidden, words)
        with torch.no_grad():  # starts at the training files' rates
            log_rates.bias.copy_((train.x.sum(0) / train.size.sum()).log())
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.GELU(), log_rates)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x.log1p()).chunk(2, dim=1)
        return mu, logvar

    def rate(self, z: Tensor) -> Tensor:
        return self.decoder(z).exp()


@dataclass
class Epoch:
    loss: float  # of training; Gaussian: from the density
    elbo: float  # of validation files; Gaussian: from the mass


def train_epoch(
    model: VAE,
    criterion: fastvae.ELBOLoss,
    optimizer: torch.optim.Optimizer,
    train: Files,
    batch: int,
) -> float:
    model.train()
    total = 0.0
    for rows in torch.randperm(len(train.x)).split(batch):
        files = train[rows]
        z, kl = fastvae.rsample_kl(*model.encode(files.x))
        recon = model.family.recon(model.rate(z), files.size)
        loss = criterion(recon, model.family.target(files.x), kl=kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows) / len(train.x)
    return total


def fit(
    name: str, model: VAE, train: Files, validation: Files, epochs: int, batch: int
) -> list[Epoch]:
    """Trains; the model ends as it was after the epoch with the best validation ELBO."""
    criterion = fastvae.ELBOLoss(model.family.likelihood)
    groups: list[dict[str, Any]] = [
        {"params": [*model.encoder.parameters(), *model.decoder.parameters()]},
        # One number per word, of which every file tells: it can move faster than the weights.
        {"params": list(model.family.parameters()), "lr": 1e-2},
    ]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    history: list[Epoch] = []
    best: dict[str, Tensor] = {}
    for _ in tqdm(range(epochs), name, unit="epoch"):
        loss = train_epoch(model, criterion, optimizer, train, batch)
        elbo = bounds(model, validation, samples=10)[0].mean().item()
        if all(elbo > epoch.elbo for epoch in history):
            best = copy.deepcopy(model.state_dict())
        history.append(Epoch(loss, elbo))
    model.load_state_dict(best)
    return history


@torch.no_grad()
def bounds(model: VAE, files: Files, samples: int, chunk: int = 8) -> tuple[Tensor, Tensor]:
    """The ELBO and ln p(x) = ln mean_k w_k, w_k = p(x|z_k) p(z_k) / q(z_k|x), of each file.

    Both from the same weights. The second too is a lower bound in expectation, and rises to ln p(x)
    with K. A chunk of files at a time: the decoder's output is [samples, chunk, words].
    """
    model.eval()
    elbos, log_ps = [], []
    for rows in torch.arange(len(files.x)).split(chunk):
        part = files[rows]
        q = fastvae.DiagonalNormal(*model.encode(part.x))
        prior = fastvae.DiagonalNormal(torch.zeros_like(q.mu), torch.zeros_like(q.mu))
        z = q.rsample((samples,))  # [K, B, latents]
        log_w = model.family.log_prob(model.rate(z), part) + prior.log_prob(z) - q.log_prob(z)
        elbos.append(log_w.mean(0))
        log_ps.append(log_w.logsumexp(0) - math.log(samples))
    return torch.cat(elbos), torch.cat(log_ps)


@torch.no_grad()
def replicate(model: VAE, files: Files) -> Tensor:
    """For each file one that the model draws in its place, from its q(z|x) and size: [B, words]."""
    model.eval()
    z = fastvae.rsample(*model.encode(files.x))
    return model.family.sample(model.rate(z), files.size)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Of one value per file: the mean, and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def draw(path: str, x: Tensor, drawn: dict[str, Tensor], histories: dict[str, list[Epoch]]) -> None:
    """x: held-out files. drawn: `replicate` of them, by family."""
    figure, (words, curves) = plt.subplots(1, 2, figsize=(8.4, 3.5), layout="constrained")
    words.scatter(x.mean(0), x.var(0), s=4, color="#cccccc", label="held-out files")
    words.axline((1, 1), slope=1, color="black", ls=":", lw=1, label="variance = mean")
    for name, counts in drawn.items():
        mean, variance = counts.mean(0), counts.var(0)
        groups = mean.argsort().split(max(1, len(mean) // 12))  # words of similar means
        medians = ([values[group].median() for group in groups] for values in (mean, variance))
        words.plot(*medians, label=name, color=COLORS[name])
    words.set(xscale="log", yscale="log", xlabel="mean of a word", ylabel="variance over files")
    words.set_title("Words held out, and medians of those drawn")
    words.legend(frameon=False, loc="upper left", fontsize=8)
    for name, history in histories.items():
        elbos = [epoch.elbo for epoch in history]
        curves.plot(range(1, len(elbos) + 1), elbos, color=COLORS[name])
        curves.plot(elbos.index(max(elbos)) + 1, max(elbos), "o", color=COLORS[name])
    curves.set(
        xlabel="epoch", ylabel="nats per file", title="ELBO of validation files, and its best"
    )
    for axes in (words, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=78)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--words", type=int, default=1000)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--samples", type=int, default=500, help="per file, to estimate ln p(x)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draws a picture")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    args = parse(argv)
    torch.manual_seed(args.seed)
    train, validation, held_out = load(args.words)
    zeros = (held_out.x == 0).double().mean().item()
    print(
        f"Python {platform.python_version()}: {args.words} words in {len(train.x)} files to train "
        f"on, {len(validation.x)} to stop by and {len(held_out.x)} held out, of whose counts "
        f"{zeros:.1%} are 0 and the largest is {held_out.x.max():.0f}"
    )
    histories, drawn, log_ps = {}, {}, {}
    figures: dict[str, dict[str, float]] = {}
    for name, family in FAMILIES.items():
        torch.manual_seed(args.seed)  # the same weights to start from
        model = VAE(family(args.words), train, args.latents)
        histories[name] = fit(name, model, train, validation, args.epochs, args.batch_size)
        elbo, log_ps[name] = bounds(model, held_out, args.samples)
        drawn[name] = replicate(model, held_out)
        figures[name] = {
            "first_loss": histories[name][0].loss,
            "loss": histories[name][-1].loss,
            "elbo": elbo.mean().item(),
            "zeros": (drawn[name] == 0).double().mean().item(),
        }
    print(
        f"{'nats per file':22}{'ELBO':>8}{'ln p(x)':>12}{'over negative binomial':>29}"
        f"{'zeros drawn':>14}"
    )
    for name, found in figures.items():
        found["log_px"], found["error"] = mean_and_error(log_ps[name])
        # File by file: most of what makes one less probable than another is in both, and cancels.
        found["gain"], found["gain_error"] = mean_and_error(
            log_ps[name] - log_ps["negative binomial"]
        )
        print(
            f"{name:22}{found['elbo']:8.1f}{found['log_px']:9.1f} ± {found['error']:5.1f}"
            f"{found['gain']:17.1f} ± {found['gain_error']:5.1f}{found['zeros']:15.1%}"
        )
    if args.plot:
        draw(args.plot, held_out.x, drawn, histories)
        print(f"wrote {args.plot}")
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small gain nothing from a second
    main()
