"""`python -m benchmarks.sweep`: whether anything is slower than plain PyTorch, over shapes, layouts
and dtypes.

Each operator with its gradients, from 4,096 elements on (below that a call's own cost is all there
is to see). Prints the worst ratios, eager / fastvae; a ratio below 1 is what the sweep is looking
for. Each time is the least of several rounds in which the two take turns.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae
from benchmarks import plain, report

WIDTHS = [1, 2, 3, 5, 8, 16, 31, 64, 784, 20_000]
BATCHES = [1, 16, 256, 4096, 32_768, 262_144]
LEAST, MOST = 4096, 1 << 22  # elements
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

Step = Callable[..., Tensor]  # of tensors alike; the value of each row


def _contiguous(t: Tensor) -> Tensor:
    return t


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_zeros(t.shape[0], t.shape[1] + 7)
    wide[:, 3:-4] = t
    return wide[:, 3:-4]


def _channels_last(t: Tensor) -> Tensor:
    """As 4 × 4 images, whose channels are the columns; cut from the batch."""
    return t.reshape(-1, t.shape[1], 4, 4).contiguous(memory_format=torch.channels_last)


LAYOUTS = {f.__name__[1:]: f for f in (_contiguous, _transposed, _sliced, _channels_last)}


def _rows(formula: Callable[..., Tensor]) -> Step:
    """plain.py sums over dimension 1."""
    return lambda *tensors: formula(*(t.flatten(1) for t in tensors))


def _fused(family: str) -> Step:
    return lambda x, *recon: fastvae.log_likelihood(recon, x, family)


class Operator(NamedTuple):
    ours: Step
    eager: Step
    domains: str  # of each input, data first (upper case), by a letter of DRAWS


DRAWS: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "r": torch.randn,
    "u": torch.rand,
    "p": lambda shape: torch.rand(shape) + 0.1,  # positive
    "c": lambda shape: torch.poisson(0.3 * torch.rand(shape)),  # counts, most of them 0
    "i": lambda shape: torch.randint(shape[1], shape),  # of the columns one
}
LIKELIHOODS = {
    "bernoulli": "Ur",
    "bernoulli_probs": "Uu",
    "gaussian": "Rr",
    "gaussian_logvar": "Rrr",
    "poisson": "Cp",
    "negative_binomial": "Cpp",
    "zero_inflated_negative_binomial": "Cppr",
}
OPERATORS = {
    "kl_divergence": Operator(
        fastvae.kl_divergence, _rows(lambda m, lv: plain.kl_divergence(m, lv)[0]), "rr"
    ),
    "rsample": Operator(fastvae.rsample, lambda m, lv: plain.rsample(m, lv)[0], "rr"),
    "rsample_kl": Operator(
        lambda m, lv: _both(*fastvae.rsample_kl(m, lv)),
        lambda m, lv: _both(plain.rsample(m, lv)[0], plain.kl_divergence(*_flat(m, lv))[0]),
        "rr",
    ),
}
OPERATORS |= {
    name: Operator(_fused(name), _rows(plain.LOG_LIKELIHOODS[name]), domains)
    for name, domains in LIKELIHOODS.items()
}
OPERATORS["categorical"] = Operator(  # the columns are the classes: one x for all of them
    lambda x, logits: fastvae.log_likelihood(logits, x.select(1, 0), "categorical"),
    lambda x, logits: plain.categorical(x.select(1, 0), logits),
    "Ir",
)


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [t.flatten(1) for t in tensors]


def _both(z: Tensor, kl: Tensor) -> Tensor:
    return z.sum() + kl.sum()


def inputs(shape: tuple[int, int], dtype: torch.dtype, layout: str, domains: str) -> list[Tensor]:
    """Data, and parameters of which gradients are wanted."""
    tensors = []
    for domain in domains:
        drawn = DRAWS[domain.lower()](shape)
        t = LAYOUTS[layout](drawn.to(dtype) if drawn.is_floating_point() else drawn).detach()
        tensors.append(t.requires_grad_(domain.islower()))
    return tensors


def ratio(operator: Operator, tensors: list[Tensor], seconds: float) -> float:
    """Of the least times, eager / fastvae, forward and backward."""
    leaves = [t for t in tensors if t.requires_grad]

    def step(function: Step) -> float:
        start = time.perf_counter()
        torch.autograd.grad(function(*tensors).sum(), leaves)
        return time.perf_counter() - start

    pair = operator.ours, operator.eager
    for function in pair:
        step(function)
    rounds = [[step(function) for function in pair]]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        rounds.append([step(function) for function in pair])
    ours, eager = (min(times) for times in zip(*rounds, strict=True))
    return eager / ours


def cases(most: int) -> Iterator[tuple[str, tuple[int, int], torch.dtype, str]]:
    for name, width, batch, dtype, layout in itertools.product(
        OPERATORS, WIDTHS, BATCHES, DTYPES, LAYOUTS
    ):
        fits = LEAST <= width * batch <= most
        if fits and (layout != "channels_last" or batch % 16 == 0):
            yield name, (batch, width), dtype, layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="of rounds, for each case")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--most", type=int, default=MOST, help="elements")
    parser.add_argument("--worst", type=int, default=20, help="how many to print")
    args = parser.parse_args()
    print(report.environment())
    found = []
    for name, shape, dtype, layout in cases(args.most):
        label = f"{name} {shape[0]}x{shape[1]} {str(dtype)[6:]} {layout}"
        if args.only in label:
            operator = OPERATORS[name]
            tensors = inputs(shape, dtype, layout, operator.domains)
            found.append((ratio(operator, tensors, args.seconds), label))
    found.sort()
    slower = sum(r < 1 for r, _ in found)
    print(f"{len(found)} cases, {slower} of them slower than eager; the worst:")
    for r, label in found[: args.worst]:
        print(f"{r:6.2f}  {label}")


if __name__ == "__main__":
    main()
