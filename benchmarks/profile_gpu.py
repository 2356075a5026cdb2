"""Profiles the training step's head on a GPU: sampling, KL, Bernoulli and all gradients.

    python -m benchmarks.profile_gpu --shape 2048 128 12288 --dtype bfloat16 --out trace.json

Prints the profiler's table and the rate of each fastvae kernel, and writes a Chrome trace
(chrome://tracing, ui.perfetto.dev).
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

import fastvae

WARM_UP, STEPS = 10, 20
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)}


class Row(Protocol):
    """What is read of one of the profiler's averages."""

    key: str
    count: int
    self_device_time_total: float  # microseconds


def head(shape: Sequence[int], dtype: torch.dtype, device: str) -> Callable[[], object]:
    """One step on fixed tensors; logits are a leaf, and z gets a gradient as from a decoder."""
    batch, latents, pixels = shape

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(batch, columns, dtype=dtype, device=device)

    mu, logvar, logits = (normal(n).requires_grad_() for n in (latents, latents, pixels))
    dz, x = normal(latents), normal(pixels).sigmoid()
    criterion = fastvae.ELBOLoss("bernoulli")

    def step() -> object:
        z, kl = fastvae.rsample_kl(mu, logvar)
        loss = criterion(logits, x, kl=kl)
        return torch.autograd.grad([z, loss], [mu, logvar, logits], [dz, None])

    return step


def rates(rows: Iterable[Row], shape: Sequence[int], dtype: torch.dtype) -> list[str]:
    """GB/s by kernel: the least that it must read and write in a step over its time in a step."""
    batch, latents, pixels = shape
    m, n = (batch * columns * dtype.itemsize for columns in (latents, pixels))
    least = {
        "rowwise_kernel": 3 * n,  # logits, x; d_logits
        "sample(_stream)?_kernel": 3 * m,  # mu, logvar; z
        "sample(_stream)?_backward_kernel": 5 * m,  # dz, mu, logvar; d_mu, d_logvar
        "elbo_reduce_kernel": None,  # a few numbers a sample
        "scale_grad_kernel": None,  # reads a factor a row, and no more where it is 1
    }
    lines = [f"{'kernel':24}{'a step':>8}{'us a step':>12}{'GB/s':>8}"]
    for kernel, traffic in least.items():
        found = [
            row for row in rows if re.search(rf"\b{kernel}\b", row.key)
        ]  # CUDA's is a template
        took = sum(row.self_device_time_total for row in found) / STEPS
        rate = f"{traffic / took / 1e3:.0f}" if traffic and took else "-"
        calls = sum(row.count for row in found) / STEPS
        name = kernel.replace("(_stream)?", "")
        lines.append(f"{name:24}{calls:8.1f}{took:12.1f}{rate:>8}")
    return lines


def run(args: argparse.Namespace, device: str) -> None:
    """`device` is "cuda"; on the CPU the same lines run, without kernels to list."""
    dtype = DTYPES[args.dtype]
    step = head(args.shape, dtype, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(WARM_UP):
        step()
    wait()
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            step()
        wait()
    averages = recorded.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=48))
    print(f"{args.dtype}, {' x '.join(map(str, args.shape))} (batch x latents x pixels)")
    print("\n".join(rates(averages, args.shape, dtype)))
    recorded.export_chrome_trace(args.out)
    print(f"wrote {args.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[2048, 128, 12288], metavar=("B", "L", "P")
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--out", default="trace.json", help="the Chrome trace")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    reason = None
    if not torch.cuda.is_available():
        reason = f"this needs a CUDA device, and torch {torch.__version__} finds none here"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "this profiles compiled kernels, but TRITON_INTERPRET=1 asks for interpreted ones"
    if reason:
        print(reason, file=sys.stderr)
        return 1
    run(args, "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
