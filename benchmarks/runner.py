"""Runs a case: checks every contender, times them in turns, and measures their memory once.

What is here times on the CPU; gpu.py does on a GPU what differs there.
"""

import functools
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case, Contender, Problem

# no_grad: the outputs alone. forward, backward: with a graph. step: the two together.
PHASES = "no_grad", "forward", "backward", "step"
BUDGET = 3.0  # seconds of rounds per case
ROUNDS = 9, 500  # at least, at most
QUIET = 0.1  # CPUs that other processes may use
ATTEMPTS = 3
# Relative to the largest element. float32: sums of some thousand terms. bfloat16: eager rounds each
# of its steps to 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass
class Measurement:
    case: Case
    traffic: dict[str, int]  # phase -> the least bytes read and written, where that is known
    faults: dict[str, str]  # contender -> what is wrong with it; it isn't timed
    seconds: dict[str, dict[str, list[float]]]  # contender -> phase -> one entry a round
    peak: dict[str, int]  # contender -> bytes over the inputs, in one step
    floor: list[float]  # torch.add(a, b, out=c), one entry a round
    others: float  # CPUs that other processes used meanwhile

    def time(self, contender: str, phase: str) -> float:
        return median(self.seconds[contender][phase])

    def speedup(self, over: str, phase: str = "step") -> float:
        """The median over rounds of a ratio within a round: a slow spell hits both alike."""
        ours, theirs = (self.seconds[name][phase] for name in ("fastvae", over))
        return median(t / o for t, o in zip(theirs, ours, strict=True))

    def bandwidth(self, phase: str) -> float | None:
        """Bytes per second of the least traffic; unknown where a contender may choose the split."""
        traffic = self.traffic.get(phase)
        return traffic and traffic / self.time("fastvae", phase)

    def floor_share(self, phase: str) -> float:
        return median(
            f / o for f, o in zip(self.floor, self.seconds["fastvae"][phase], strict=True)
        )


MEASURED: list[Measurement] = []  # in the order of measuring, for the report


class Lineup(NamedTuple):
    problem: Problem
    fit: dict[str, Contender]  # those that may race
    faults: dict[str, str]


def prepare(case: Case) -> Lineup:
    """Builds the case's tensors and checks every contender on them."""
    torch.manual_seed(0)
    torch.compiler.reset()  # else the next shape counts as a recompilation, and may be left eager
    problem = case.problem(case.shape, case.target)
    contenders = {name: case.run(name) for name in case.contenders}
    faults = {
        name: fault for name, run in contenders.items() if (fault := check(case, run, problem))
    }
    fit = {name: run for name, run in contenders.items() if name not in faults}
    return Lineup(problem, fit, faults)


@functools.cache
def measure(case: Case) -> Measurement:
    problem, fit, faults = prepare(case)
    peak = {name: peak_memory(run, problem) for name, run in fit.items()}
    # A disturbed race is run again; the quietest one counts.
    races: list[Race] = []
    while not races or (len(races) < ATTEMPTS and races[-1].others > QUIET):
        races.append(race(fit, problem))
    best = min(races, key=lambda r: r.others)
    traffic = problem.traffic
    measurement = Measurement(case, traffic, faults, best.seconds, peak, best.floor, best.others)
    MEASURED.append(measurement)
    return measurement


class Race(NamedTuple):
    seconds: dict[str, dict[str, list[float]]]
    floor: list[float]
    others: float


def race(contenders: dict[str, Contender], problem: Problem) -> Race:
    """All contenders take turns in every round, and another one begins each time."""
    order = list(contenders)
    seconds: dict[str, dict[str, list[float]]] = {n: {p: [] for p in PHASES} for n in order}
    floor: list[float] = []
    a = max(problem.inputs.values(), key=Tensor.numel).detach()
    b, c = torch.ones_like(a), torch.empty_like(a)
    gc.collect()
    gc.disable()
    try:
        for name in order * 2:
            one_round(contenders[name], problem)  # warm-up, thrown away
        start, others = time.perf_counter(), others_seconds()
        while len(floor) < ROUNDS[0] or (
            len(floor) < ROUNDS[1] and time.perf_counter() - start < BUDGET
        ):
            for name in order:
                for phase, took in zip(PHASES, one_round(contenders[name], problem), strict=True):
                    seconds[name][phase].append(took)
            before = time.perf_counter()
            torch.add(a, b, out=c)
            floor.append(time.perf_counter() - before)
            order.append(order.pop(0))
    finally:
        gc.enable()
    elapsed = time.perf_counter() - start
    return Race(seconds, floor, max(0.0, others_seconds() - others) / elapsed)


def alternate(*functions: Callable[[], object], budget: float = BUDGET) -> list[list[float]]:
    """Seconds of each call, in turns; two warm-up rounds are thrown away."""
    seconds: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(seconds[0]) < ROUNDS[0] + 2 or (
        len(seconds[0]) < ROUNDS[1] and time.perf_counter() - start < budget
    ):
        for function, taken in zip(functions, seconds, strict=True):
            before = time.perf_counter()
            function()
            taken.append(time.perf_counter() - before)
    return [taken[2:] for taken in seconds]


def interleave(ours: Callable[[], object], theirs: Callable[[], object]) -> list[float]:
    """Their time over ours, round by round."""
    return [t / o for o, t in zip(*alternate(ours, theirs), strict=True)]


def others_seconds() -> float:
    """CPU seconds that all processes but this one have used. 0 where the system doesn't tell.

    On a CPU that another process shares, each OpenMP barrier waits for a time slice (some ms), and
    whoever has more of them looks worse than he is.
    """
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def one_round(run: Contender, problem: Problem) -> tuple[float, float, float, float]:
    """Seconds for each of PHASES. What a contender returns is freed outside the clock."""
    inputs = problem.inputs
    with torch.no_grad():
        start = time.perf_counter()
        outputs = run(**inputs)
        no_grad = time.perf_counter() - start
    del outputs
    start = time.perf_counter()
    outputs = run(**inputs)
    middle = time.perf_counter()
    gradients = backward(outputs, problem)
    end = time.perf_counter()
    del outputs, gradients
    return no_grad, middle - start, end - middle, end - start


def backward(outputs: tuple[Tensor, ...], problem: Problem) -> tuple[Tensor, ...]:
    """grad, not backward(): in a model these inputs are no leaves, so nothing is accumulated."""
    wanted = [t for t in problem.inputs.values() if t.requires_grad]
    return torch.autograd.grad(outputs, wanted, problem.upstream)


def check(case: Case, run: Contender, problem: Problem) -> str | None:
    """Compare values and gradients with the eager formula in float64; say what is wrong, if it is.

    Contenders draw differently, so the noise is taken from the z that came back.
    """
    names = [name for name, t in problem.inputs.items() if t.requires_grad]
    try:
        outputs = run(**problem.inputs)
        gradients = backward(outputs, problem)
    except Exception as error:  # any: the report carries it, and the others are still timed
        return f"{type(error).__name__}: {error}".splitlines()[0]

    wide = {
        k: t.detach().double().requires_grad_(t.requires_grad) for k, t in problem.inputs.items()
    }
    noise = {}
    if case.sampled:
        eps = ((outputs[0].double() - wide["mu"]) / torch.exp(0.5 * wide["logvar"])).detach()
        if abs(eps.mean()) > 0.1 or abs(eps.std() - 1) > 0.1:
            return f"noise isn't standard normal: mean {eps.mean():.3f}, std {eps.std():.3f}"
        noise = {"eps": eps}
    upstream = tuple(None if g is None else g.double() for g in problem.upstream)
    truth = case.eager(**wide, **noise)
    expected = (*truth, *backward(truth, problem._replace(inputs=wide, upstream=upstream)))
    labels = [f"output {i}" for i in range(len(outputs))] + [f"d_{name}" for name in names]
    for label, got, want in zip(labels, (*outputs, *gradients), expected, strict=True):
        off = (got.double() - want).abs().max() / want.abs().max()
        if not off <= TOLERANCE[case.target.dtype]:  # a NaN too
            return f"{label} is off by {off:.1e} of its largest element"
    return None


def peak_memory(run: Contender, problem: Problem) -> int:
    """The most bytes that torch's CPU allocator had handed out at once during a step.

    Tensors only, as the profiler's running sum of allocations and releases: unlike the resident
    set it doesn't depend on what malloc keeps from earlier runs. A run of its own, not timed.
    """
    backward(run(**problem.inputs), problem)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        outputs = run(**problem.inputs)
        gradients = backward(outputs, problem)
    del outputs, gradients
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
