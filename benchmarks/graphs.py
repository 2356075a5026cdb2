"""Times the whole steps of the benchmarks on a GPU twice: launched one by one, by wall clock, as a
training loop does; and as CUDA graphs, which is what the device takes, without the host.

    python -m benchmarks.graphs [--out FILE.json]

Each contender's step, forward and backward, is launched LAUNCHES times with one wait at the end,
and then captured and replayed by triton.testing.do_bench_cudagraph. L2 is not flushed between: the
small steps find their tensors there. Values are checked by `pytest benchmarks --device cuda`.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastvae
from benchmarks import gpu, report
from benchmarks.cases import CASES, Case
from benchmarks.runner import backward

LAUNCHES = 100
# What fastvae's kernels are written in, where there are both; then those it is compared with.
CONTENDERS = ("cuda", "triton", *report.RIVALS)


def step_of(case: Case, contender: str) -> Callable[[], object]:
    problem = case.problem(case.shape, case.target)
    run = case.run(contender if contender in report.RIVALS else "fastvae")

    def step() -> object:
        return backward(run(**problem.inputs), problem)

    return step


def launched(step: Callable[[], object]) -> float:
    """Mean microseconds by wall clock."""
    for _ in range(LAUNCHES // 10):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / LAUNCHES * 1e6


def replayed(step: Callable[[], object]) -> float:
    """Mean microseconds of a graph's replay."""
    testing = importlib.import_module("triton.testing")
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
        return float(testing.do_bench_cudagraph(step)) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    options = parser.parse_args()
    if reason := gpu.obstacle():
        print(reason, file=sys.stderr)
        return 1
    from fastvae import _C

    ours = [name for name in CONTENDERS[:2] if fastvae.backends()[name].available]
    contenders = [*ours, *report.RIVALS]
    print(report.gpu_name())
    print(f"{'step, us launched / replayed':40}" + "".join(f"{c:>18}" for c in contenders))
    rows = []
    for case in CASES["cuda"]:
        if case.op != "elbo":
            continue
        times = {}
        for contender in contenders:
            torch.manual_seed(0)
            torch.compiler.reset()
            before = _C.to_triton(contender == "triton")
            try:
                step = step_of(case, contender)
                times[contender] = launched(step), replayed(step)
            finally:
                _C.to_triton(before)
        rows.append({"case": case.name, "microseconds": times})
        cells = "".join(f"{f'{a:.0f} / {b:.1f}':>18}" for a, b in times.values())
        print(f"{case.name:40}{cells}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
