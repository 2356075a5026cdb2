"""Times the whole steps of the benchmarks as CUDA graphs: what the device takes, without the host.

    python -m benchmarks.graphs

Each contender's step, forward and backward, is captured and replayed by
triton.testing.do_bench_cudagraph. L2 is not flushed between replays: the small steps find their
tensors there. Values are checked by `pytest benchmarks --device cuda`, not here.
"""

import importlib
import sys

import torch

from benchmarks import gpu, report
from benchmarks.cases import CASES, Case
from benchmarks.runner import backward


def replayed(case: Case, contender: str) -> float:
    """Mean microseconds of a replay."""
    problem, run = case.problem(case.shape, case.target), case.run(contender)
    testing = importlib.import_module("triton.testing")
    with torch.cuda.stream(torch.cuda.Stream()):
        backward(run(**problem.inputs), problem)  # compiles
        took = testing.do_bench_cudagraph(lambda: backward(run(**problem.inputs), problem))
    return float(took) * 1e3


def main() -> int:
    if reason := gpu.obstacle():
        print(reason, file=sys.stderr)
        return 1
    print(report.gpu_name())
    print(f"{'step':40}{'fastvae':>12}{'eager':>12}{'compile':>12}{'x eager':>10}{'x compile':>11}")
    for case in CASES["cuda"]:
        if case.op != "elbo":
            continue
        torch.manual_seed(0)
        torch.compiler.reset()
        ours, *theirs = (replayed(case, name) for name in report.CONTENDERS)
        times = "".join(f"{t:9.1f} us" for t in (ours, *theirs))
        ratios = "".join(f"{t / ours:{10 + i}.2f}" for i, t in enumerate(theirs))
        print(f"{case.name:40}{times}{ratios}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
