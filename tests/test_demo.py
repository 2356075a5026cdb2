"""The demo runs, writes its picture, and its figures are what theory allows."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytestmark = pytest.mark.usefixtures("one_thread")


def load() -> ModuleType:
    return importlib.import_module("digits")  # examples/ is on pytest's path


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


def test_autoencoder_against_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one reconstructs better; of the other the samples are digits, and all digits' like."""
    picture = tmp_path / "both.png"
    arguments = ["--epochs", "20", "--out", str(picture)]
    figures = load().main(["--compare", *arguments])
    autoencoder, vae = (
        {key.removeprefix(name): value for key, value in figures.items() if key.startswith(name)}
        for name in ("autoencoder_", "VAE_")
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert autoencoder["reconstruction"] < vae["reconstruction"] - 10
    assert autoencoder["pixel_error"] < 0.8 * vae["pixel_error"]
    assert autoencoder["sample_distance"] > 1.4 * vae["sample_distance"]
    assert autoencoder["digit_distance"] > 1.1 * vae["digit_distance"]
    assert autoencoder["kl"] == 0 and vae["kl"] > 1
    assert vae["sample_distance"] > figures["distance"] > 0.5  # the digits that are held out

    printed = capsys.readouterr().out
    for model in (autoencoder, vae):
        assert f"reconstruction {model['reconstruction']:.2f} nats" in printed
        assert f"to the nearest training digit {model['sample_distance']:.2f}" in printed
    elbo = -(vae["reconstruction"] + vae["kl"])
    assert f"KL {vae['kl']:.2f}, ELBO {elbo:.2f}" in printed
    assert printed.count("no KL, no ELBO") == 1
