"""`python -m fastvae.roofline`: what the compiled Triton kernels say of their speed on a GPU.

Every kernel × dtype × architecture is compiled here, without a GPU, and its machine code is read:
registers, spills, bytes and instructions per element. The bound (memory or instruction issue) and
the share of the memory's peak that follow are PREDICTIONS; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import likelihoods

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ROWS, PIXELS, LATENTS = 8192, 12288, 128
KINDS = ("load", "store")


class Device(NamedTuple):
    """Peaks from the vendors' data sheets."""

    name: str
    bandwidth: float  # bytes / s
    issue: float  # instructions of one thread / s: units × lanes issued per clock × clock


DEVICES = {
    "sm_80": Device("A100 80GB SXM", 2039e9, 108 * 128 * 1.41e9),
    "sm_90": Device("H100 SXM", 3350e9, 132 * 128 * 1.755e9),
    "sm_100": Device("B200", 8000e9, 148 * 128 * 1.85e9),
    "gfx942": Device("MI300X", 5300e9, 304 * 64 * 2.1e9),
}


class Case(NamedTuple):
    name: str
    run: Callable[[], None]  # one launch
    reads: int  # tensors of the rows' size: the designed traffic …
    writes: int  # … of which the artefact's must be
    cols: int


@dataclass(frozen=True)
class Row:
    """One line of the report; per element of a row, and for rows of the case's length."""

    case: str
    arch: str
    dtype: str
    designed_bytes: float
    bytes: float  # in the machine code's 128-bit loads and stores
    instructions: float
    registers: int
    spilled_bytes: int
    accesses: list[tuple[str, int, int]]  # (load or store, bytes a thread, how many), all of them
    doubles: list[float]  # see aot.Artefact
    seconds: float

    @property
    def memory_time(self) -> float:
        return self.designed_bytes / DEVICES[self.arch].bandwidth

    @property
    def issue_time(self) -> float:
        return self.instructions / DEVICES[self.arch].issue

    @property
    def bound(self) -> str:
        return "memory" if self.memory_time >= self.issue_time else "issue"

    @property
    def share(self) -> float:
        """Of the memory's peak: an upper bound, as neither latency nor launches are in it."""
        return min(1.0, self.memory_time / self.issue_time)


class Shapes:
    """Tensors without memory: compiling asks for their dtypes, strides and alignment alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.seed = torch.empty(1, dtype=torch.int64, device="meta")

    def matrix(self, cols: int, rows: int = ROWS, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(rows, cols, dtype=dtype or self.dtype, device="meta")

    def row(self, rows: int = ROWS) -> Tensor:
        return torch.empty(rows, dtype=self.compute, device="meta")


def options(family: str) -> Sequence[float]:
    return likelihoods.get(family).options if family in likelihoods.registry else ()


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel on large aligned tensors."""
    from fastvae import _triton
    from fastvae._triton.formulas import elements

    t = Shapes(dtype)

    def rowwise(family: str, inputs: int, wanted: int, cols: int) -> Case:
        """The last `wanted` of the inputs get a gradient."""

        def run() -> None:
            given, grads = ([t.matrix(cols) for _ in range(n)] for n in (inputs, wanted))
            needs = [False] * (inputs - wanted) + [True] * wanted
            _triton.rowwise(
                family, given, None, None, options(family), 1.0, ROWS, t.row(), grads, needs
            )

        return Case(family + ("+grad" if wanted else ""), run, inputs, wanted, cols)

    def forward(kl: bool) -> None:
        mu, logvar, z = (t.matrix(LATENTS) for _ in range(3))
        _triton.sample_forward(mu, logvar, t.seed, 1, 0, None, z, t.row() if kl else None)

    def backward() -> None:
        mu, logvar, dz, *grads = (t.matrix(LATENTS) for _ in range(5))
        kl = t.matrix(1, dtype=t.compute)
        _triton.sample_backward(dz, kl, mu, logvar, t.seed, 1, 0, None, *grads)

    for name in elements:
        count = len(likelihoods.get(name).formula_names)
        yield rowwise(name, 1 + count, 0, PIXELS)
        yield rowwise(name, 1 + count, count, PIXELS)
    for name, count in (("standard_kl", 2), ("normal_kl", 4)):
        yield rowwise(name, count, 0, LATENTS)
        yield rowwise(name, count, count, LATENTS)
    yield Case("rsample", partial(forward, False), 2, 1, LATENTS)
    yield Case("rsample_kl", partial(forward, True), 2, 1, LATENTS)
    yield Case("rsample_kl_backward", backward, 3, 2, LATENTS)
    yield Case("scale_grad", lambda: _triton.scale_grad(t.matrix(PIXELS), t.row()), 1, 1, PIXELS)


def variants(dtype: torch.dtype) -> Iterator[Case]:
    """The kernels' other forms: what they spill matters, their traffic is not compared."""
    from fastvae import _triton

    t = Shapes(dtype)

    def masked(cols: int, rows: int) -> None:
        """x and mask per sample against 4 draws of the logits."""
        x, mask = (t.matrix(cols, rows // 4, torch.uint8) for _ in range(2))
        logits, grad = t.matrix(cols, rows), t.matrix(cols, rows)
        weight = t.matrix(1, rows // 4)
        _triton.rowwise(
            "bernoulli", [x, logits], mask, weight, (), 1.0, rows // 4, t.row(rows), [grad],
            [False, True],
        )  # fmt: skip

    def per_row(cols: int, rows: int) -> None:
        x, mean = t.matrix(cols, rows), t.matrix(cols, rows)
        logvar = t.matrix(1, rows).expand(rows, cols)
        grads = [t.matrix(cols, rows), t.row(rows)]
        _triton.rowwise(
            "gaussian_logvar", [x, mean, logvar], None, None, options("gaussian_logvar"), 1.0,
            rows, t.row(rows), grads, [False, True, True],
        )  # fmt: skip

    def forward(cols: int, index: Tensor | None = None) -> None:
        mu, logvar, z = t.matrix(cols), t.matrix(cols), t.matrix(cols, 3 * ROWS)
        _triton.sample_forward(mu, logvar, t.seed, 3, 2**40, index, z, t.row())

    def backward(cols: int, index: Tensor | None = None) -> None:
        mu, logvar, dz, *grads = (t.matrix(cols, n * ROWS) for n in (1, 1, 3, 1, 1))
        kl = t.matrix(1, dtype=t.compute)
        _triton.sample_backward(dz, kl, mu, logvar, t.seed, 3, 2**40, index, *grads)

    def reduce(batch: int, kind: str) -> None:
        outs = (t.row(batch) if kind == "none" else t.row(1).view(()) for _ in range(3))
        _triton.elbo_reduce(t.matrix(batch, 8), t.row(batch), t.row(batch), 1.0, 1.0, *outs)

    def categorical(wanted: int, classes: int = 256, sites: int = 32768, rows: int = 64) -> None:
        x, (logits, grad) = t.matrix(sites, rows), (t.matrix(classes * sites, rows) for _ in "12")
        planes, grads = [x.view(rows, 1, -1), logits.view(rows, classes, -1)], [grad] * wanted
        _triton.sites(
            "categorical", planes, None, None, options("categorical"), 1.0, rows, t.row(rows),
            [g.view(rows, classes, -1) for g in grads], [False, wanted == 1],
        )  # fmt: skip

    yield Case("categorical", partial(categorical, 0), 0, 0, 32768)
    yield Case("categorical+grad", partial(categorical, 1), 0, 0, 32768)
    yield Case("masked", partial(masked, 785, 2048), 0, 0, 785)
    yield Case("masked, int64", partial(masked, PIXELS, 2**20), 0, 0, PIXELS)
    yield Case("per row", partial(per_row, 785, 2048), 0, 0, 785)
    yield Case("per row, split", partial(per_row, 10**6, 4), 0, 0, 10**6)
    for cols in (20, 64, 5000):
        yield Case(f"rsample_kl K=3 x{cols}", partial(forward, cols), 0, 0, cols)
        yield Case(f"backward K=3 x{cols}", partial(backward, cols), 0, 0, cols)
    index = torch.empty(ROWS, dtype=torch.int64, device="meta")
    yield Case("rsample_kl K=3, indexed", partial(forward, 64, index), 0, 0, 64)
    yield Case("backward K=3, indexed", partial(backward, 64, index), 0, 0, 64)
    for kind in ("sum", "none"):
        yield Case(f"elbo_reduce {kind}", partial(reduce, 1000, kind), 0, 0, 1000)


def measure(case: Case, arch: str, dtype_name: str) -> Row:
    """Compiles the case and reads what came out."""
    from fastvae._triton.aot import compile_launches

    (built,) = compile_launches(arch, case.run)
    itemsize, loop = DTYPES[dtype_name].itemsize, built.loop
    vectors = {k: n for k, n in built.accesses(loop).items() if k[1] == 16}
    moved = {kind: sum(w * n for (k, w), n in vectors.items() if k == kind) for kind in KINDS}
    # The compiler may have unrolled the loop: its stores tell how many tiles the body has.
    tile_stores = case.writes * itemsize * built.elements
    tiles = max(moved["store"] // tile_stores, 1) if tile_stores else 1
    elements = tiles * built.elements
    inside, whole = built.issued(loop), built.issued(built.instructions)
    trips = case.cols / (built.constexprs.get("C", case.cols) * tiles)
    outside = (whole - inside) / max(trips, 1)
    return Row(
        case=case.name,
        arch=arch,
        dtype=dtype_name,
        designed_bytes=(case.reads + case.writes) * itemsize,
        bytes=sum(moved.values()) / elements,
        instructions=(inside + outside) / elements,
        registers=built.registers,
        spilled_bytes=built.spilled_bytes,
        accesses=[(*k, n) for k, n in built.accesses(built.instructions).items()],
        doubles=built.doubles,
        seconds=built.seconds,
    )


def report(rows: list[Row]) -> str:
    """The table, by architecture."""

    def line(r: Row) -> str:
        text = f"{r.case:22}{r.dtype:>9}{r.bytes:>8.1f}{r.instructions:>12.1f}{r.registers:>11}"
        text += f"{r.spilled_bytes:>8}{r.seconds:>8.2f}s"
        return text + (f"{r.bound:>8}{r.share:>9.0%}" if r.designed_bytes else "")

    lines = []
    for arch in dict.fromkeys(r.arch for r in rows):
        device = DEVICES[arch]
        lines += [
            f"\n{arch}: PREDICTED for {device.name} "
            f"({device.bandwidth / 1e9:.0f} GB/s, {device.issue / 1e12:.1f}e12 instructions/s)",
            f"{'kernel':22}{'dtype':>9}{'B/elem':>8}{'instr/elem':>12}{'registers':>11}"
            f"{'spills':>8}{'compile':>9}{'bound':>8}{'of peak':>9}",
            *(line(r) for r in rows if r.arch == arch),
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastvae.roofline", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--case", nargs="+", help="leave out all others")
    parser.add_argument("--variants", action="store_true", help="the kernels' other forms instead")
    parser.add_argument("--json", help="write the rows there too")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as cache:  # an empty one: the seconds are of compiling
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = [
            measure(case, arch, dtype)
            for arch in args.arch
            for dtype in args.dtype
            for case in (variants if args.variants else cases)(DTYPES[dtype])
            if args.case is None or case.name in args.case
        ]
    print(report(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([{**asdict(r), "bound": r.bound, "share": r.share} for r in rows], file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
