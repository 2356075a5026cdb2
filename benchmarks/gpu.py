"""Times a case on a GPU, by triton.testing.do_bench: CUDA events, the L2 cache flushed each time.

Checks, phases and contenders are those of runner.py. Nothing is timed in Triton's interpreter.
"""

import functools
import gc
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pytest
import torch
from torch import Tensor

import fastvae
from benchmarks.cases import CASES, Case, Contender, Problem
from benchmarks.runner import MEASURED, PHASES, Measurement, backward, prepare

ROUNDS = 3  # of do_bench, each itself the median of a tenth of a second
LEAST_COPY = 256 * 2**20  # bytes: from DRAM to DRAM, whatever the L2 cache
RESOLUTION = 5e-7  # seconds: of CUDA's events
FIRST = CASES["cuda"][0]


def obstacle() -> str | None:
    """Why nothing can be timed on a GPU here, in one sentence."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return (
            "--device cuda times compiled kernels, but TRITON_INTERPRET=1 asks for interpreted ones"
        )
    if not torch.cuda.is_available():
        return f"--device cuda needs a CUDA device, and torch {torch.__version__} finds none here"
    if importlib.util.find_spec("triton") is None:
        return "--device cuda needs Triton, whose do_bench times the kernels"
    backends = fastvae.backends()
    if backends["cuda"].available or backends["triton"].available:
        return None
    why = "; ".join(f"'{name}': {backends[name].detail}" for name in ("cuda", "triton"))
    return f"--device cuda needs a backend: {why}"


@dataclass
class GpuMeasurement(Measurement):
    """Its floor is a copy of a large buffer: what the memory does when nothing is computed."""

    copied: int  # bytes that it reads and writes

    def copy_bandwidth(self) -> float:
        return self.copied / median(self.floor)

    def floor_share(self, phase: str) -> float:
        return (self.bandwidth(phase) or 0.0) / self.copy_bandwidth()


@functools.cache
def measure(case: Case) -> Measurement:
    first_step(FIRST)
    problem, fit, faults = prepare(case)
    peak = {name: peak_memory(run, problem) for name, run in fit.items()}
    largest = max(t.nbytes for t in problem.inputs.values())
    source = torch.ones(max(largest, LEAST_COPY), dtype=torch.uint8, device=case.target.device)
    seconds, copies = race(fit, problem, source)
    measurement = GpuMeasurement(
        case, problem.traffic, faults, seconds, peak, copies, others=0.0, copied=2 * source.nbytes
    )
    MEASURED.append(measurement)
    return measurement


@functools.cache
def first_step(case: Case) -> str:
    """How long fastvae's first step in this process took, with nothing compiled before."""
    problem, run = case.problem(case.shape, case.target), case.run("fastvae")
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_CACHE_DIR", cache)
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            backward(run(**problem.inputs), problem)
            torch.cuda.synchronize()
        except Exception as error:  # any: the other contenders and cases are still timed
            return f"failed, {type(error).__name__}: {error}".splitlines()[0]
        return f"{time.perf_counter() - start:.2f} s"


def race(
    contenders: dict[str, Contender], problem: Problem, source: Tensor
) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Seconds by contender and phase, and those of the copy; another contender begins each time."""
    order = list(contenders)
    seconds: dict[str, dict[str, list[float]]] = {n: {p: [] for p in PHASES} for n in order}
    copies: list[float] = []
    destination = torch.empty_like(source)
    for _ in range(ROUNDS):
        for name in order:
            for phase, took in zip(PHASES, one_round(contenders[name], problem), strict=True):
                seconds[name][phase].append(took)
        copies.append(duration(lambda: destination.copy_(source)))
        order = order[1:] + order[:1]
    return seconds, copies


def one_round(run: Contender, problem: Problem) -> tuple[float, float, float, float]:
    """Seconds for each of PHASES.

    The backward is what the step takes longer than the forward. Alone it can't be repeated: with
    retain_graph the fused step would have to spare the gradient that it otherwise scales in place,
    and compiled code would refuse, as it reuses what it saved.
    """

    def outputs() -> None:
        run(**problem.inputs)

    def step() -> None:
        backward(run(**problem.inputs), problem)

    with torch.no_grad():
        no_grad = duration(outputs)
    forward, both = duration(outputs), duration(step)
    return no_grad, forward, max(both - forward, RESOLUTION), both


def duration(function: Callable[[], object]) -> float:
    """Median seconds on the device."""
    testing = importlib.import_module("triton.testing")  # timing on the CPU needs no Triton
    return testing.do_bench(function, return_mode="median") * 1e-3


def peak_memory(run: Contender, problem: Problem) -> int:
    """The most bytes that torch had allocated at once during a step, its inputs left out."""
    backward(run(**problem.inputs), problem)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run(**problem.inputs)
    gradients = backward(outputs, problem)
    torch.cuda.synchronize()
    del outputs, gradients
    return torch.cuda.max_memory_allocated() - before
