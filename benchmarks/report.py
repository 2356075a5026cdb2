"""The table at the end of `pytest benchmarks/`."""

from collections.abc import Iterable
from statistics import median

import torch

import fastvae
from benchmarks import gpu
from benchmarks.gpu import GpuMeasurement
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
GPU_LEGEND = f"""\
times: medians by triton.testing.do_bench, of {gpu.ROUNDS} in turns; L2 is flushed before each call.
They are the device's; launches count where it waits for them, as it does in small cases.
x eager, x compile: times faster that fastvae is, median of the rounds' ratios.
phase: no_grad = outputs alone; forward = with a graph; step = with gradients; backward = the rest.
GB/s: the least traffic (inputs read once, outputs and gradients written once) over fastvae's time.
copy: these GB/s over those of dst.copy_(src), of the largest input or 256 MiB, in the same rounds.
peak: the most that a step has allocated at once, its inputs left out."""
CONTENDERS = "fastvae", "eager", "torch.compile"
RIVALS = CONTENDERS[1:]


def lines(measured: Iterable[Measurement]) -> list[str]:
    """The table's lines; a contender that computes something wrong has a reason, not a time."""
    measured = list(measured)
    on_gpu = [m for m in measured if isinstance(m, GpuMeasurement)]
    header = tuple("copy" if on_gpu and name == "floor" else name for name in HEADER)
    table = [header]
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
    head = gpu_environment(on_gpu) if on_gpu else [environment()]
    legend = (GPU_LEGEND if on_gpu else LEGEND).splitlines()
    return [*head, "", text[0], *rule, *text[1:], *rule, *legend, *remarks]


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
        *(duration(m, m.time(name, phase)) if name in m.seconds else "-" for name in CONTENDERS),
        *ratios,
        f"{rate / 1e9:.1f}" if rate else "",
        f"{m.floor_share(phase):.0%}" if rate else "",
        " / ".join(peak) if step else "",
    )


def duration(m: Measurement, seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.{1 if isinstance(m, GpuMeasurement) else 0}f} us"


def environment() -> str:
    backend = fastvae.backends()["cpp"]
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; fastvae cpp: {backend.detail}"
    )


def gpu_environment(measured: list[GpuMeasurement]) -> list[str]:
    copy = median(m.copy_bandwidth() for m in measured)
    first = gpu.first_step(gpu.FIRST)
    return [
        gpu_name(),
        f"copy: {copy / 1e9:.0f} GB/s, read and write; the median over the cases",
        f"first fastvae step of this process, Triton's kernels not compiled yet: {first}",
    ]


def gpu_name() -> str:
    backends = fastvae.backends()
    ours = "cuda" if backends["cuda"].available else "triton"  # as "auto" goes
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return (
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, {toolkit}; "
        f"fastvae {ours}: {backends[ours].detail}"
    )
