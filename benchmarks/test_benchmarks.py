"""Times every case of `cases.py` by phase and contender: `pytest benchmarks/`.

Narrow it down with -k ("elbo and 128x784"), leave the requirement out with -m "not requirement",
keep the figures with --benchmark-json PATH. How it measures: NOTES.md.
"""

from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import CASES, STEPS, Case
from benchmarks.runner import PHASES, measure

# torch.compile uses parts of torch that torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Tape:
    """A clock that replays times taken before.

    pytest-benchmark times one contender after another; on a busy machine the ratio of two such
    times says little. So `measure` lets them take turns, and each test plays its share back.
    """

    def __init__(self) -> None:
        self.readings: list[float] = []

    def load(self, durations: list[float]) -> None:
        self.readings = [reading for took in reversed(durations) for reading in (took, 0.0)]

    def __call__(self) -> float:
        return self.readings.pop()


tape = Tape()
LEGS = [(c, phase, who) for c in CASES for phase in PHASES for who in c.contenders]


@pytest.mark.benchmark(timer=tape)
@pytest.mark.parametrize(
    "case, phase, contender", LEGS, ids=[f"{c.name}-{phase}-{who}" for c, phase, who in LEGS]
)
def test_speed(case: Case, phase: str, contender: str, benchmark: BenchmarkFixture) -> None:
    measured = measure(case)
    assert contender not in measured.faults, measured.faults[contender]
    durations = measured.seconds[contender][phase]
    tape.load(durations)
    benchmark.group = f"{case.name} {phase}"
    benchmark.extra_info["peak_bytes"] = measured.peak[contender]
    benchmark.extra_info["floor_seconds"] = median(measured.floor)
    benchmark.pedantic(lambda: None, rounds=len(durations))


@pytest.mark.requirement
def test_step_is_three_times_faster_than_eager() -> None:
    measured = measure(STEPS["middle"])
    assert not measured.faults.keys() & {"fastvae", "eager"}, measured.faults
    speedup = measured.speedup("eager")
    assert speedup >= 3, f"while other processes used {measured.others:.1f} CPUs"
