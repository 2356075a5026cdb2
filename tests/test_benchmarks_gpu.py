"""The GPU benchmarks' bookkeeping, on CPU tensors and with a clock that is made up."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_measures_reports_and_draws(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    cases, gpu, report, plot = (load(name) for name in ("cases", "gpu", "report", "plot"))

    def duration(function: Callable[[], object]) -> float:
        function()
        without_graph = {"outputs": 1e-3}
        seconds = {"outputs": 2e-3, "step": 5e-3, "<lambda>": 1e-4}
        return (seconds if torch.is_grad_enabled() else without_graph)[function.__name__]

    half = cases.Target("cpu", torch.bfloat16)
    case = dataclasses.replace(cases.step_case(cases.Shape(32, 64, 100), half), compiled=False)

    def without_noise(
        logits: torch.Tensor, x: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return mu + 0 * logvar, logits.sum()

    broken = dataclasses.replace(case, fastvae=without_noise)
    monkeypatch.setattr(gpu, "FIRST", case)
    monkeypatch.setattr(gpu, "MEASURED", [])
    monkeypatch.setattr(gpu, "LEAST_COPY", 10_000)
    monkeypatch.setattr(gpu, "duration", duration)
    monkeypatch.setattr(gpu, "peak_memory", lambda run, problem: 2**20)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")

    measured = gpu.measure(case)
    assert not measured.faults
    assert measured.time("fastvae", "backward") == pytest.approx(3e-3)
    assert measured.speedup("eager") == 1
    step = 2 * (3 * 32 * 100 + 8 * 32 * 64)  # bytes
    assert measured.bandwidth("step") == pytest.approx(step / 5e-3)
    assert measured.copy_bandwidth() == pytest.approx(2 * 10_000 / 1e-4)
    assert measured.floor_share("step") == pytest.approx(step / 5e-3 / 2e8)
    assert "noise" in gpu.measure(broken).faults["fastvae"]

    lines = report.lines(gpu.MEASURED)
    assert lines[0].startswith("a device; torch ")
    assert "elbo[bernoulli-cpu-bf16-32x100]" in "\n".join(lines)
    assert lines[-1].startswith("withheld: ")
    assert plot.draw(gpu.MEASURED, lines[0], tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_cases_are_named_once(load: Callable[[str], ModuleType]) -> None:
    for device, cases in load("cases").CASES.items():
        assert {case.target.device for case in cases} == {device}
        assert len({case.name for case in cases}) == len(cases)


def test_says_what_is_missing(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu, profile_gpu = load("gpu"), load("profile_gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in gpu.obstacle()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in gpu.obstacle()
    assert profile_gpu.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_rates_of_the_profiled_kernels(load: Callable[[str], ModuleType]) -> None:
    profile_gpu = load("profile_gpu")
    steps = profile_gpu.STEPS
    found = SimpleNamespace(key="rowwise_kernel", count=steps, self_device_time_total=100.0 * steps)
    lines = profile_gpu.rates([found], (1000, 10, 1000), torch.float32)
    assert lines[1].split() == ["rowwise_kernel", "1.0", "100.0", "120"]
    assert lines[2].split() == ["sample_kernel", "0.0", "0.0", "-"]
