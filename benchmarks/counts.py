"""Count likelihoods at the size of a gene panel: forward and backward, in turns with plain PyTorch.

    python -m benchmarks.counts [--device cuda] [--genes 20000] [--batch 128]

Per-gene dispersions, float32, outputs allocated in the call. `eager` is the formula as scvi-tools
writes it; `compile` is torch.compile of that.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastvae
from benchmarks import plain

ROUNDS = 9


def problem(batch: int, genes: int, zeros: float, device: str) -> dict[str, Tensor]:
    """Overdispersed counts of which about that share are 0, a few of them large."""
    torch.manual_seed(0)
    rate = 0.115 if zeros > 0.7 else 0.76
    x = torch.poisson(torch._standard_gamma(torch.full((batch, genes), 2.0)) * rate / 2)
    x = torch.where(torch.rand(batch, genes) < 0.002, 17 * x, x)
    mean = 2 * rate * torch.rand(batch, genes) + 1e-3
    tensors = {"x": x, "mean": mean, "dispersion": torch.randn(genes).exp()}
    tensors["zero_logits"] = torch.randn(batch, genes)
    return {name: t.to(device) for name, t in tensors.items()}


def timed(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--genes", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else fastvae.backends()["cpp"]
    print(f"{where}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"[{options.batch}, {options.genes}], per-gene dispersion, float32")
    print(f"{'family':34}{'zeros':>6}{'fastvae':>11}{'eager':>11}{'compile':>11}"
          f"{'x eager':>9}{'x compile':>11}")  # fmt: skip
    names = {
        "poisson": ["mean"],
        "negative_binomial": ["mean", "dispersion"],
        "zero_inflated_negative_binomial": ["mean", "dispersion", "zero_logits"],
    }
    rows = []
    for family, needed in names.items():
        formula = plain.LOG_LIKELIHOODS[family]
        compiled = torch.compile(formula, dynamic=False)
        for zeros in (0.9, 0.5):
            tensors = problem(options.batch, options.genes, zeros, options.device)
            x, leaves = tensors["x"], [tensors[n].requires_grad_() for n in needed]
            kl = x.new_zeros(len(x))

            def ours(
                x: Tensor = x, leaves: list[Tensor] = leaves, kl: Tensor = kl, name: str = family
            ) -> None:
                loss = fastvae.elbo_loss(tuple(leaves), x, kl=kl, likelihood=name)
                torch.autograd.grad(loss, leaves)

            def theirs(
                f: Callable[..., Tensor], x: Tensor = x, leaves: list[Tensor] = leaves
            ) -> None:
                torch.autograd.grad(-f(x, *leaves).mean(), leaves)

            calls: list[Callable[[], object]] = [
                ours,
                partial(theirs, formula),
                partial(theirs, compiled),
            ]
            for call in calls:
                timed(call, options.device)
                timed(call, options.device)
            rounds = [[timed(call, options.device) for call in calls] for _ in range(ROUNDS)]
            a, b, c = (statistics.median(column) for column in zip(*rounds, strict=True))
            share = float((x == 0).float().mean())
            times = "".join(f"{t * 1e3:>8.2f} ms" for t in (a, b, c))
            ratios = [statistics.median(r[i] / r[0] for r in rounds) for i in (1, 2)]
            print(f"{family:34}{share:>6.0%}{times}{ratios[0]:>9.1f}{ratios[1]:>11.1f}")
            seconds = {"fastvae": a, "eager": b, "compile": c}
            rows.append({"family": family, "zeros": share, "seconds": seconds})
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
