"""Times every case of `cases.py` by phase and contender: `pytest benchmarks/ [--device cuda]`.

Narrow it down with -k ("elbo and 128x784"), leave the requirement out with -m "not requirement",
keep the figures with --benchmark-json PATH. How it measures: NOTES.md.
"""

from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import gpu, runner
from benchmarks.cases import CASES, MIDDLE, Case
from benchmarks.runner import PHASES, Measurement

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = CASES[metafunc.config.getoption("device", "cpu")]
        legs = [(c, phase, who) for c in cases for phase in PHASES for who in c.contenders]
        ids = [f"{c.name}-{phase}-{who}" for c, phase, who in legs]
        metafunc.parametrize("case, phase, contender", legs, ids=ids)


def measure(case: Case) -> Measurement:
    return (gpu if case.target.device == "cuda" else runner).measure(case)


@pytest.mark.benchmark(timer=tape)
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
def test_step_is_three_times_faster_than_eager(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("device", "cpu") != "cpu":
        pytest.skip("stated for the CPU")
    (case,) = (c for c in CASES["cpu"] if c.op == "elbo" and c.shape == MIDDLE)
    measured = measure(case)
    assert not measured.faults.keys() & {"fastvae", "eager"}, measured.faults
    speedup = measured.speedup("eager")
    assert speedup >= 3, f"while other processes used {measured.others:.1f} CPUs"
