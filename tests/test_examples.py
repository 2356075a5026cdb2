"""The examples run and learn. What those with other libraries compute: test_integrations.py."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples train on its digits")
pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"

# Its own use of torch's pytrees, and advice on workers and logging intervals.
lightning_warns = pytest.mark.filterwarnings(
    "ignore::FutureWarning:lightning.pytorch", "ignore::UserWarning:lightning.pytorch"
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need(library: str) -> ModuleType:
    module: ModuleType = pytest.importorskip(library, reason=f"{library} is not installed")
    return module


def torchrun(ranks: int, *arguments: str) -> list[float]:
    """The loss of each epoch."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / "ddp.py"), "--epochs", "2", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]


def test_ddp() -> None:
    """With --same-noise two ranks train as one does; without, each draws from its own generator."""
    one, two = torchrun(1, "--same-noise"), torchrun(2, "--same-noise")
    own = torchrun(2)
    assert len(one) == len(own) == 2 and one[1] < 0.7 * one[0] and own[1] < 0.7 * own[0]
    assert two == pytest.approx(one, rel=1e-5)
    assert own != pytest.approx(one, rel=1e-5)


@lightning_warns
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision: str) -> None:
    need("lightning")
    example = load("lightning_module")
    one, three = (example.main(["--precision", precision, "--epochs", n]) for n in "13")
    assert three["val_loss"] < one["val_loss"] < 64 * 0.5
    for stage in ("train", "val"):  # the terms are means over the same digits
        parts = three[f"{stage}_reconstruction"] + three[f"{stage}_kl"]
        assert three[f"{stage}_loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("arguments", [[], ["--accumulate", "2"], ["--mixed-precision", "bf16"]])
def test_accelerate(arguments: list[str]) -> None:
    need("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    figures = load("accelerate_loop").main(["--epochs", "2", *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)  # else the next one gets this precision
    GradientState._reset_state()
    assert figures["loss"] < 0.7 * figures["first_loss"] < 64 * 0.5


def test_diffusers_runs() -> None:
    need("diffusers")
    figures = load("diffusers_kl").main(["--digits", "256", "--epochs", "2"])
    assert figures["loss"] < 0.9 * figures["first_loss"]
    assert math.isfinite(figures["kl"]) and figures["kl"] > 0


@pytest.mark.parametrize("reconstruction_loss", ["bce", "mse"])
def test_pythae_runs(reconstruction_loss: str, tmp_path: Path) -> None:
    need("pythae.models")
    arguments = ["--reconstruction-loss", reconstruction_loss, "--epochs", "1"]
    figures = load("pythae_model").main([*arguments, "--out", str(tmp_path)])
    assert figures["loss"] < 0.8 * figures["first_loss"]  # of the model that pythae saved


@lightning_warns
def test_scvi_runs() -> None:
    need("scvi")
    figures = load("scvi_module").main(["--epochs", "3", "--cells", "100", "--samples", "20"])
    assert figures["loss"] < figures["first_loss"] - 1
    assert figures["log_px"] > -figures["loss"]  # Jensen: many samples are a tighter bound


def test_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("matplotlib")
    picture = tmp_path / "counts.png"
    arguments = ["--words", "200", "--epochs", "15", "--samples", "50", "--plot", str(picture)]
    families = load("counts").main(arguments)
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(families) == 4
    for found in families.values():
        assert found["loss"] < 0.95 * found["first_loss"]
        assert found["elbo"] < found["log_px"] < 0  # Jensen; no probability exceeds 1
        assert f"{found['log_px']:.1f} ±" in printed
    # Words come in bursts: of the variance that Poisson lacks, the negative binomial has the most.
    for name in ("Poisson", "Gaussian on log1p(x)"):
        assert families[name]["gain"] < -4 * families[name]["gain_error"]
        assert families[name]["zeros"] < families["negative binomial"]["zeros"]


@pytest.mark.parametrize("name", ["Gaussian", "Poisson", "NegativeBinomial", "ZeroInflated"])
def test_a_family_of_counts(name: str) -> None:
    """Its probabilities sum to 1 over the integers, and its draws have them."""
    need("matplotlib")
    example = load("counts")
    family = getattr(example, name)(1).requires_grad_(False)
    for parameter in family.parameters():
        parameter.fill_(-0.5)
    n = 20_000
    rate, size = torch.full((n, 1), 3.0), torch.full((n,), 0.8)
    integers = example.Files(torch.arange(n)[:, None].float(), size)
    p = family.log_prob(rate, integers).exp().double()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = family.sample(rate, size).long().flatten().bincount(minlength=12)[:12] / n
    error = (p * (1 - p) / n).sqrt()[:12]
    assert ((drawn - p[:12]).abs() < 5 * error).all()


def test_the_mass_of_a_count_far_from_the_mean() -> None:
    """Its logarithm is right where the normal's cdf rounds to 0 or to 1."""
    need("matplotlib")
    log_mass, log_ndtr = load("counts").log_mass, torch.special.log_ndtr
    x, mean = torch.tensor([0.0, 0.0, 5.0, 1e6]), torch.tensor([30.0, -30.0, 60.0, 0.0])
    found = log_mass(x, mean, torch.zeros(4))
    edge = math.log(1.5)  # of what rounds to 0
    below, above = log_ndtr(torch.tensor([edge - 30, -edge - 30], dtype=torch.float64))
    expected = torch.stack([below, -above.exp()])  # ln(1 − t) = −t for a t as small as this
    torch.testing.assert_close(found[:2], expected, rtol=1e-12, atol=0)
    assert found[2:].isfinite().all() and (found[2:] < -100).all()


def test_pyro_runs() -> None:
    need("pyro")
    figures = load("pyro_elbo").main(["--epochs", "2"])
    assert figures["loss"] < 0.9 * figures["first_loss"]
