"""β over a training run: the published curves, their ends, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastvae
from fastvae.schedules import Cyclical, Linear, Sigmoid

ALL = [Linear(10), Cyclical(8, rise=0.25, cycles=3), Sigmoid(50, 4)]
each = pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)


def test_linear() -> None:
    assert [Linear(4)(s) for s in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [Linear(2, delay=3)(s) for s in range(7)] == [0, 0, 0, 0, 0.5, 1, 1]
    assert [Linear(4, start=1, stop=3)(s) for s in (0, 1, 4, 9)] == [1, 1.5, 3, 3]
    assert [Linear(4, start=2, stop=0)(s) for s in (0, 1, 4)] == [2, 1.5, 0]
    assert Linear(3)(0.75) == 0.25  # epochs need not be whole


@pytest.mark.parametrize(("total", "cycles", "ratio"), [(400, 4, 0.5), (100, 5, 0.8), (60, 3, 1)])
def test_cyclical_is_the_paper_s(total: int, cycles: int, ratio: float) -> None:
    """Fu et al. 2019, equations 6 and 7: t counts from 1, and T / M is whole here."""
    schedule = Cyclical(total / cycles, rise=ratio)
    for t in range(1, total + 1):
        tau = (t - 1) % math.ceil(total / cycles) / (total / cycles)
        assert schedule(t - 1) == pytest.approx(tau / ratio if tau <= ratio else 1, abs=1e-12)


def test_cyclical_ends_and_begins_again() -> None:
    assert [Cyclical(4)(s) for s in range(9)] == [0, 0.5, 1, 1, 0, 0.5, 1, 1, 0]
    assert [Cyclical(4, cycles=1)(s) for s in range(9)] == [0, 0.5, 1, 1, 1, 1, 1, 1, 1]
    assert Cyclical(4, start=0.5, stop=2)(1) == 1.25


def test_sigmoid() -> None:
    schedule = Sigmoid(2500, 400)  # k = 0.0025, the usual code's
    for step in (0, 100, 2500, 4000, 10_000):
        assert schedule(step) == pytest.approx(1 / (1 + math.exp(-0.0025 * (step - 2500))))
    assert schedule(2500) == 0.5
    assert [Sigmoid(1e6, 1e-3)(s) for s in (0, 1e9)] == [0, 1]  # where exp would overflow
    assert Sigmoid(10, 1, start=1, stop=3)(10) == 2


def test_a_period_that_is_no_binary_fraction() -> None:
    """0.3 / 0.1 and 100 / (100 / 3) are less than 3."""
    assert [Cyclical(0.1)(s) for s in (0.1, 0.2, 0.3, 0.7, 1.0)] == [0] * 5
    assert Cyclical(100 / 3)(100) == 0 and Cyclical(0.1, cycles=3)(0.3) == 1


def test_numpy_s_numbers_do_not_wrap_around() -> None:
    assert Linear(10, delay=10)(np.uint8(5)) == 0
    assert Linear(1000, delay=300)(np.uint8(3)) == 0
    assert Sigmoid(2500, 400)(np.uint32(5)) == Sigmoid(2500, 400)(5)
    assert Cyclical(np.int8(100), cycles=np.int8(4))(3) == 0.06
    assert type(Linear(np.float32(10))(np.float32(5))) is float


@each
def test_compiled_with_the_step_as_an_argument(schedule: Any) -> None:
    compiled = torch.compile(lambda x, step: x * schedule(step), backend="eager")
    for step in range(5):
        torch.testing.assert_close(compiled(torch.ones(1), step), torch.ones(1) * schedule(step))


@each
def test_stays_between_its_ends_and_keeps_no_state(schedule: Any) -> None:
    values = [schedule(s / 2) for s in range(300)]
    assert all(isinstance(v, float) and 0 <= v <= 1 for v in values)
    assert values[-1] == pytest.approx(1)
    assert [schedule(s / 2) for s in reversed(range(300))] == values[::-1]
    for again in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert again == schedule and again(7) == schedule(7)
    assert eval(repr(schedule)) == schedule


@each
def test_a_loss_takes_it(schedule: Callable[[int], float]) -> None:
    criterion = fastvae.ELBOLoss()
    recon, x, kl = torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0, 2.0])
    for step in (0, 3, 60):
        criterion.beta = schedule(step)
        terms = criterion.terms(recon, x, kl=kl)
        torch.testing.assert_close(terms.loss, schedule(step) * terms.kl - terms.log_likelihood)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Linear(0), ValueError, "steps must be finite and above 0, got 0"),
        (lambda: Linear(math.inf), ValueError, "steps must be finite and above 0, got inf"),
        (lambda: Linear("3"), TypeError, "steps must be a number, got str"),  # type: ignore[arg-type]
        (lambda: Linear(3, delay=-1), ValueError, "delay must be finite and at least 0, got -1"),
        (lambda: Linear(3, start=-1), ValueError, "start must be finite and at least 0, got -1"),
        (lambda: Linear(3, stop=math.nan), ValueError, "stop must be finite and at least 0"),
        (lambda: Linear(3)(10**400), ValueError, "step must be finite and at least 0, got 1000"),
        (lambda: Linear(3)(-1), ValueError, "step must be finite and at least 0, got -1"),
        (lambda: Linear(3)(None), TypeError, "step must be a number, got NoneType"),  # type: ignore[arg-type]
        (lambda: Cyclical(-2), ValueError, "period must be finite and above 0, got -2"),
        (lambda: Cyclical(2, rise=0), ValueError, "rise must be finite and above 0, got 0"),
        (lambda: Cyclical(2, rise=1.5), ValueError, "rise must be at most 1, got 1.5"),
        (lambda: Cyclical(2, cycles=0), ValueError, "cycles must be finite and at least 1, got 0"),
        (lambda: Sigmoid(-1, 2), ValueError, "midpoint must be finite and at least 0, got -1"),
        (lambda: Sigmoid(1, 0), ValueError, "width must be finite and above 0, got 0"),
        (lambda: Sigmoid(1, True), TypeError, "width must be a number, got bool"),
    ],
)
def test_refusals(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
