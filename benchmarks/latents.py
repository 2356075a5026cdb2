"""What the latent side's options cost: forward and backward, in turns with plain PyTorch.

    python -m benchmarks.latents

σ or ln σ instead of logvar, a KL per step, per dimension, per element, a mask, free bits; each
against the usual lines for the same, and against the call without the option.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastvae

ROUNDS, SECONDS = 15, 0.02
SHAPES = ((512, 20), (4096, 128), (64, 50, 32))

Call = Callable[[Tensor, Tensor], Tensor]


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())


def kl_std(mu: Tensor, std: Tensor) -> Tensor:
    return 0.5 * (mu.pow(2) + std.pow(2) - 1 - 2 * std.log())


def drawn(mu: Tensor, std: Tensor) -> Tensor:
    return (mu + std * torch.randn_like(std)).sum()


def both(z: Tensor, divergence: Tensor) -> Tensor:
    return z.sum() + divergence.sum()


def cases(shape: tuple[int, ...]) -> dict[str, tuple[Call, Call, bool]]:
    """Ours, theirs, and whether the second input is a σ."""
    kept = torch.rand(*shape[:-1], 1) < 0.7
    steps = len(shape) - 1
    x = torch.zeros(shape[0], 1)
    bce = partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="sum")

    def with_bits(mu: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.elbo_loss(x, x, mu, logvar, free_bits=0.5)

    return {
        "rsample_kl, logvar": (
            lambda m, s: both(*fastvae.rsample_kl(m, s)),
            lambda m, s: drawn(m, (0.5 * s).exp()) + kl(m, s).sum(),
            False,
        ),
        "rsample_kl, log_std": (
            lambda m, s: both(*fastvae.rsample_kl(m, log_std=s)),
            lambda m, s: drawn(m, s.exp()) + kl(m, 2 * s).sum(),
            False,
        ),
        "rsample_kl, std": (
            lambda m, s: both(*fastvae.rsample_kl(m, std=s)),
            lambda m, s: drawn(m, s) + kl_std(m, s).sum(),
            True,
        ),
        "kl": (
            lambda m, s: fastvae.kl_divergence(m, s).sum(),
            lambda m, s: kl(m, s).flatten(1).sum(1).sum(),
            False,
        ),
        "kl, each step": (
            lambda m, s: fastvae.kl_divergence(m, s, batch_dims=steps).sum(),
            lambda m, s: kl(m, s).sum(-1).sum(),
            False,
        ),
        "kl, each dimension": (
            lambda m, s: fastvae.kl_divergence(m, s, per="dimension").sum(),
            lambda m, s: kl(m, s).mean(0).sum(),
            False,
        ),
        "kl, each element": (
            lambda m, s: fastvae.kl_divergence(m, s, per="element").sum(),
            lambda m, s: kl(m, s).sum(),
            False,
        ),
        "kl, masked": (
            lambda m, s: fastvae.kl_divergence(m, s, mask=kept).sum(),
            lambda m, s: (kl(m, s) * kept).flatten(1).sum(1).sum(),
            False,
        ),
        "free bits": (
            with_bits,
            lambda m, s: kl(m, s).mean(0).clamp(min=0.5).sum() + bce(x, x) / len(x),
            False,
        ),
    }


def timed(call: Call, leaves: list[Tensor], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        torch.autograd.grad(call(*leaves), leaves)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    print(f"{fastvae.backends()['cpp'].detail}; {torch.get_num_threads()} threads")
    print(f"{'':22}{'shape':>16}{'fastvae us':>12}{'eager us':>10}{'x eager':>9}{'x logvar':>10}")
    for shape in SHAPES:
        plain = 1.0
        for name, (ours, theirs, of_std) in cases(shape).items():
            mu, spread = torch.randn(2, *shape)
            spread = spread.exp() if of_std else spread
            leaves = [mu.clone().requires_grad_(), spread.clone().requires_grad_()]
            once = max(timed(theirs, leaves, 3) for _ in range(3))
            repeats = max(int(SECONDS / once), 1)
            rounds = [[timed(f, leaves, repeats) for f in (ours, theirs)] for _ in range(ROUNDS)]
            a, b = (statistics.median(column) * 1e6 for column in zip(*rounds, strict=True))
            ratio = statistics.median(t / o for o, t in rounds)
            plain = a if name in ("rsample_kl, logvar", "kl") else plain
            print(
                f"{name:22}{' x '.join(map(str, shape)):>16}{a:12.1f}{b:10.1f}{ratio:9.2f}"
                f"{a / plain:10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
