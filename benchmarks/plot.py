"""The picture of a run: how much faster whole steps are, and how near to the memory's floor."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

from benchmarks.gpu import GpuMeasurement
from benchmarks.runner import Measurement

COLORS = {"eager": "#8fa9bf", "torch.compile": "#2c3e50", "fastvae": "#c0392b"}


def draw(measured: Iterable[Measurement], title: str, path: Path) -> bool:
    """Speed-ups of the step on the left, its GB/s on the right; False if there was no such case."""
    shown = [m for m in measured if "fastvae" in m.seconds]
    if not shown:
        return False
    figure, (ratios, rates) = plt.subplots(
        1, 2, figsize=(13, 1.6 + 0.34 * len(shown)), layout="constrained", sharey=True
    )
    figure.suptitle(title, fontsize=10)
    height = 0.38
    for offset, rival in ((-height / 2, "eager"), (height / 2, "torch.compile")):
        bars = {y: m.speedup(rival) for y, m in enumerate(shown) if rival in m.seconds}
        places = [y + offset for y in bars]
        drawn = ratios.barh(places, list(bars.values()), height, label=rival, color=COLORS[rival])
        ratios.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
    ratios.axvline(1, color="black", lw=0.8)
    ratios.set(
        title="times faster than …, whole step", xlabel="ratio", ylim=(len(shown) - 0.4, -0.6)
    )
    ratios.set_yticks(range(len(shown)), [m.case.name for m in shown], fontsize=8)
    ratios.legend(frameon=False)

    achieved = [(m.bandwidth("step") or 0.0) / 1e9 for m in shown]
    drawn = rates.barh(range(len(shown)), achieved, 0.7, label="fastvae", color=COLORS["fastvae"])
    rates.bar_label(drawn, [f"{m.floor_share('step'):.0%}" for m in shown], padding=2, fontsize=8)
    # The floor's bandwidth: that of a copy on a GPU, of torch.add on a CPU.
    gpu = any(isinstance(m, GpuMeasurement) for m in shown)
    floors = [
        (m.bandwidth("step") or 0.0) / m.floor_share("step") / 1e9
        if not isinstance(m, GpuMeasurement)
        else m.copy_bandwidth() / 1e9
        for m in shown
    ]
    label = "copy" if gpu else "torch.add(a, b, out=c) of the reconstruction's shape"
    rates.plot(floors, range(len(shown)), color="black", ls="--", marker="|", label=label)
    rates.set(
        title="least traffic over time, whole step",
        xlabel="GB/s",
        xlim=(0, 1.1 * max(floors + achieved)),
    )
    rates.legend(frameon=False)
    for axes in (ratios, rates):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
