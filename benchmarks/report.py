"""The table at the end of `pytest benchmarks/`."""

from collections.abc import Iterable

import torch

import fastvae
from benchmarks.runner import PHASES, QUIET, Measurement

HEADER = (
    "case",
    "phase",
    "fastvae",
    "eager",
    "compile",
    "x eager",
    "x compile",
    "GB/s",
    "floor",
    "peak MiB: fastvae/eager/compile",
)
LEGEND = """\
times: medians. x eager, x compile: times faster that fastvae is, median of the rounds' ratios.
phase: no_grad = outputs alone; forward, backward = with a graph; step = both.
GB/s: the least traffic (inputs read once, outputs and gradients written once) over fastvae's time.
floor: time of torch.add(a, b, out=c) on the largest input over fastvae's time, in the same rounds.
peak: the most that a step has allocated at once, its inputs left out."""
CONTENDERS = "fastvae", "eager", "torch.compile"
RIVALS = CONTENDERS[1:]


def lines(measured: Iterable[Measurement]) -> list[str]:
    """The table's lines; a contender that computes something wrong has a reason, not a time."""
    measured = list(measured)
    table: list[tuple[str, ...]] = [HEADER]
    for measurement in measured:
        table += [row(measurement, phase) for phase in PHASES]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADER))]
    pad = [str.ljust] * 2 + [str.rjust] * (len(HEADER) - 2)
    text = [
        "  ".join(f(c, w) for f, c, w in zip(pad, cells, widths, strict=True)) for cells in table
    ]
    rule = ["-" * len(text[0])]
    remarks = [
        f"withheld: {m.case.name} {name}: {fault}"
        for m in measured
        for name, fault in m.faults.items()
    ]
    remarks += [
        f"disturbed: {m.case.name}: other processes used {m.others:.1f} CPUs; don't rely on it"
        for m in measured
        if m.others > QUIET
    ]
    return [environment(), "", text[0], *rule, *text[1:], *rule, *LEGEND.splitlines(), *remarks]


def row(m: Measurement, phase: str) -> tuple[str, ...]:
    ours = "fastvae" in m.seconds
    # A speed-up over something wrong, or of something wrong, means nothing.
    ratios = [f"{m.speedup(r, phase):.2f}" if ours and r in m.seconds else "-" for r in RIVALS]
    rate = m.bandwidth(phase) if ours else None
    step = phase == "step"
    peak = [f"{m.peak[name] / 2**20:.1f}" if name in m.peak else "-" for name in CONTENDERS]
    return (
        m.case.name if phase == PHASES[0] else "",
        phase,
        *(duration(m.time(name, phase)) if name in m.seconds else "-" for name in CONTENDERS),
        *ratios,
        f"{rate / 1e9:.1f}" if rate else "",
        f"{m.floor_share(phase):.0%}" if rate else "",
        " / ".join(peak) if step else "",
    )


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def environment() -> str:
    backend = fastvae.backends()["cpp"]
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; fastvae cpp: {backend.detail}"
    )
