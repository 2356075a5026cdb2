"""β over a training run: stateless callables, ``beta = schedule(step)``.

A schedule holds no count, so that resuming is calling it with the step one is at. Steps may be
batches or epochs, and need not be whole.
"""

import dataclasses
import math
import numbers

__all__ = ["Cyclical", "Linear", "Sigmoid"]


def _number(name: str, value: object, least: float, *, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not least <= number < math.inf or (above and number == least):
        what = "above" if above else "at least"
        raise ValueError(f"{name} must be finite and {what} {least:g}, got {value}")
    return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Schedule:
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        self._keep("start", 0)
        self._keep("stop", 0)

    def _keep(self, name: str, least: float, *, above: bool = False) -> None:
        """Checked, and as a float: numpy's integers wrap around."""
        object.__setattr__(self, name, _number(name, getattr(self, name), least, above=above))

    def _at(self, part: float) -> float:
        """`start` at 0, `stop` at 1, exactly."""
        return (1 - part) * self.start + part * self.stop


@dataclasses.dataclass(frozen=True)
class Linear(_Schedule):
    """From `start` to `stop` over `steps` steps, after `delay` others at `start`; then `stop`.

    Warm-up (Sønderby et al. 2016, section 2.3), the monotonic schedule of Fu et al. (2019). With
    `start` above `stop` it comes down.

    Args:
        steps: how many steps the rise takes, above 0.
        delay: steps before it begins, at least 0.
        start: β at first, at least 0.
        stop: β at last, at least 0.

    Raises:
        ValueError: an argument, or the step, is out of its range.
        TypeError: one is not a number.
    """

    steps: float
    delay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keep("steps", 0, above=True)
        self._keep("delay", 0)

    def __call__(self, step: float) -> float:
        risen = (_number("step", step, 0) - self.delay) / self.steps
        return self._at(min(max(risen, 0.0), 1.0))


@dataclasses.dataclass(frozen=True)
class Cyclical(_Schedule):
    """`Linear` again and again (Fu et al. 2019, equations 6 and 7): β rises over the first `rise`
    of each period, stays at `stop` for the rest, and begins again.

    Args:
        period: steps in a cycle, above 0: T / M, rounded up, in the paper, whose default M is 4.
        rise: the share of a period in which β rises, in (0, 1]: R in the paper.
        cycles: after so many β stays at `stop`; None: they never end.
        start: β at the beginning of a cycle, at least 0.
        stop: β at its end, at least 0.

    Raises:
        ValueError: an argument, or the step, is out of its range.
        TypeError: one is not a number.
    """

    period: float
    rise: float = 0.5
    cycles: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keep("period", 0, above=True)
        self._keep("rise", 0, above=True)
        if self.rise > 1:
            raise ValueError(f"rise must be at most 1, got {self.rise}")
        if self.cycles is not None:
            self._keep("cycles", 1)

    def __call__(self, step: float) -> float:
        cycle = _number("step", step, 0) / self.period
        begun = math.floor(cycle + 1e-9)  # 0.3 / 0.1 is a little less than 3
        if self.cycles is not None and begun >= self.cycles:
            return self._at(1.0)
        return self._at(min(max(cycle - begun, 0.0) / self.rise, 1.0))


@dataclasses.dataclass(frozen=True)
class Sigmoid(_Schedule):
    """A logistic curve from `start` to `stop` (Bowman et al. 2016, figure 2), half of it at
    `midpoint`: σ((step − midpoint) / width).

    Args:
        midpoint: the step at which β is in the middle, at least 0.
        width: how many steps e-fold what is left, above 0; β goes from 12% to 88% in 4 widths.
        start: β long before, at least 0.
        stop: β long after, at least 0.

    Raises:
        ValueError: an argument, or the step, is out of its range.
        TypeError: one is not a number.
    """

    midpoint: float
    width: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keep("midpoint", 0)
        self._keep("width", 0, above=True)

    def __call__(self, step: float) -> float:
        away = _number("step", step, 0) - self.midpoint
        # σ(t) = ½ (1 + tanh(t / 2)) overflows nowhere.
        return self._at(0.5 + 0.5 * math.tanh(away / (2 * self.width)))
