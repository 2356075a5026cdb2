"""The categorical likelihood: forward and backward, in turns with torch's cross_entropy.

    python -m benchmarks.classes [--device cuda] [--largest]

Outputs allocated in the call; `--largest` adds 64 images of 32,768 sites with 256 classes (needs
13 GB).
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastvae
from benchmarks import plain, report
from benchmarks.counts import timed
from fastvae.likelihoods import Categorical

ROUNDS = 7
# batch, classes, sites (0: no event dimension), where the classes are
SIZES = [
    (65_536, 10, 0, 1),
    (4096, 1000, 0, 1),
    (512, 50_000, 0, 1),
    (16, 50_000, 0, 1),
    (64, 3, 4096, 1),
    (64, 21, 16_384, -1),
    (8, 256, 32_768, 1),
    (8, 256, 32_768, -1),
]
LARGEST = (64, 256, 32_768, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--largest", action="store_true")
    options = parser.parse_args()
    print(report.environment())
    print(f"{'logits':24}{'dtype':>10}{'fastvae':>12}{'x eager':>9}{'x compile':>11}")
    cases = [(size, torch.float32) for size in SIZES] + [(SIZES[-2], torch.bfloat16)]
    for size, dtype in cases + [(LARGEST, torch.float32)] * options.largest:
        batch, classes, sites, dim = size
        event = [sites] if sites else []
        shape = [batch, *event, classes] if dim == -1 else [batch, classes, *event]
        logits = torch.randn(shape, dtype=dtype, device=options.device).requires_grad_()
        x = torch.randint(classes, (batch, *event), device=options.device)
        kl, likelihood = torch.zeros(batch, device=options.device), Categorical(dim)

        def ours(
            logits: Tensor = logits, x: Tensor = x, kl: Tensor = kl, like: Categorical = likelihood
        ) -> None:
            loss = fastvae.elbo_loss(logits, x, kl=kl, likelihood=like)
            torch.autograd.grad(loss, logits)

        def formula(logits: Tensor, x: Tensor, dim: int = dim) -> Tensor:
            return -plain.categorical(x, logits.movedim(dim, 1)).mean()

        def theirs(
            f: Callable[[Tensor, Tensor], Tensor], logits: Tensor = logits, x: Tensor = x
        ) -> None:
            torch.autograd.grad(f(logits, x), logits)

        torch._dynamo.reset()
        calls: list[Callable[[], object]] = [
            ours,
            partial(theirs, formula),
            partial(theirs, torch.compile(formula)),
        ]
        for call in 2 * calls:
            call()
        times = [[timed(call, options.device) for call in calls] for _ in range(ROUNDS)]
        first, *others = (statistics.median(t) for t in zip(*times, strict=True))
        ratios = [other / first for other in others]
        print(f"{shape!s:24}{str(dtype)[6:]:>10}{first * 1e3:>9.2f} ms{ratios[0]:>9.2f}"
              f"{ratios[1]:>11.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
