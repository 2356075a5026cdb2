"""The demo runs, writes its picture, and its figures are what theory allows."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_two_epochs(likelihood: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "digits.png"
    arguments = ["--epochs", "2", "--samples", "50", "--out", str(picture)]
    figures = load().main([*arguments, "--likelihood", likelihood])

    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(value) for value in figures.values()), figures
    assert figures["log_px"] >= figures["elbo"]  # Jensen: the bound is a bound
    assert figures["elbo"] > figures["first_elbo"]  # the second epoch has taught it something
    assert figures["train_kl"] > 0
    parts = figures["train_reconstruction"] + figures["train_kl"]
    assert figures["train_elbo"] == pytest.approx(-parts, rel=1e-6)
    assert "held-out ln p(x)" in capsys.readouterr().out


def test_same_seed_same_figures(tmp_path: Path) -> None:
    digits = load()
    arguments = ["--epochs", "1", "--samples", "2", "--out", str(tmp_path / "digits.png")]
    first, again, other = (digits.main([*arguments, "--seed", seed]) for seed in ("1", "1", "2"))
    assert first == again
    assert first != other
