"""`python -m benchmarks.scaling`: draws docs/scaling.png, time of a step by batch and row width."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import report, runner
from benchmarks.cases import CPU, Contender, Problem, Shape, step_case

BATCHES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000]
WIDTHS = [10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000]
PICTURE = Path(__file__).parents[1] / "docs" / "scaling.png"


def times(shape: Shape) -> tuple[float, float]:
    """Seconds of a step: fastvae, eager."""
    case = step_case(shape, CPU)
    problem = case.problem(shape, CPU)

    def step(run: Contender, problem: Problem) -> object:
        return runner.backward(run(**problem.inputs), problem)

    pair: list[Callable[[], object]] = [
        partial(step, run, problem) for run in (case.fastvae, case.eager)
    ]
    seconds = runner.alternate(*pair, budget=0.6)
    return median(seconds[0]), median(seconds[1])


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    figure.suptitle(report.environment(), fontsize=8)
    sweeps = (
        (left, "batch, 20 latents, 784 pixels", BATCHES, [Shape(b, 20, 784) for b in BATCHES]),
        (right, "pixels, batch 64, 20 latents", WIDTHS, [Shape(64, 20, w) for w in WIDTHS]),
    )
    for axes, label, sizes, shapes in sweeps:
        ours, eager = zip(*(times(shape) for shape in shapes), strict=True)
        axes.loglog(sizes, eager, "o-", color="#8fa9bf", label="eager")
        axes.loglog(sizes, ours, "o-", color="#c0392b", label="fastvae")
        axes.set(xlabel=label, title="sampling + KL + Bernoulli, with gradients")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("seconds")
    left.legend(frameon=False)
    figure.savefig(PICTURE, dpi=120)
    print(f"plot: {PICTURE}")


if __name__ == "__main__":
    main()
