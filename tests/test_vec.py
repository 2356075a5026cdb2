"""The SIMD vocabulary in ULP over the float32 range, against float64: itself, by tests/ulp.cpp, and
through the operators."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastvae

ROOT = Path(__file__).parents[1]
#: ULP through the operators, on any instruction set.
BOUND = 2.0
#: ULP by function, on any instruction set.
BOUNDS = {
    "exp": 1.5, "exp_negative": 1.0, "log": 1.0, "log_unit": 1.0, "log1p": 1.0,
    "phi": 2.0, "phi_negative": 0.0, "expm1": 1.25,
    "bernoulli_value_0": 1.75, "bernoulli_value_1": 1.75,
    "bernoulli_grad_0": 1.75, "bernoulli_grad_1": 1.75,
    "sinpi_absolute": 1e-7, "cospi_absolute": 1e-7,
}  # fmt: skip
FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mf16c"],
    "NEON": [],  # cross-compiled and emulated
}

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

forward = torch.ops.fastvae.row_forward


def build(program: str, isa: str, folder: Path) -> list[str]:
    """Compiles tests/`program`.cpp for an instruction set; the command that runs it."""
    include = Path(torch.__file__).parent / "include"
    libraries = str(include.parent / "lib")
    compiler, name, emulator = os.environ.get("CXX", "g++").split()[0], isa, []
    link = ["-L", libraries, f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
    if isa == "NEON":
        compiler, name, link, emulator = "aarch64-linux-gnu-g++", "DEFAULT", ["-static"], [QEMU]
    if shutil.which(compiler) is None or not include.is_dir():
        pytest.skip(f"needs {compiler} and torch's headers")
    if None in emulator:
        pytest.skip("needs qemu-aarch64 (Debian: qemu-user)")
    flags = f"-std=c++20 -O2 -fopenmp -ffp-contract=off -fno-math-errno -DCPU_CAPABILITY={name}"
    done = subprocess.run(
        [compiler, *flags.split(), f"-DCPU_CAPABILITY_{name}", *FLAGS[isa], "-w",
         "-I", str(ROOT / "csrc"), "-I", str(include), str(ROOT / f"tests/{program}.cpp"),
         *link, "-o", program],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [*emulator, str(folder / program)]


def errors(isa: str, step: int, folder: Path) -> dict[str, float]:
    """The largest error of each function over every step-th float32, by ulp.cpp for this set."""
    listing = subprocess.run(
        [*build("ulp", isa, folder), str(step)], check=True, capture_output=True, text=True
    ).stdout
    print(f"\n{isa}, every {step}:\n{listing}")
    return {line.split()[0]: float(line.split()[1]) for line in listing.splitlines()}


USABLE = ["DEFAULT", "AVX2", "AVX512"]
USABLE = (
    USABLE[: 1 + USABLE.index(fastvae.backends()["cpp"].detail.split(",")[0])]
    if (fastvae.backends()["cpp"].available)
    else []
)


@pytest.mark.parametrize("step", [1021, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("isa", USABLE)
def test_every_function_keeps_its_bound(isa: str, step: int, tmp_path: Path) -> None:
    within_bounds(errors(isa, step, tmp_path))


def within_bounds(measured: dict[str, float]) -> None:
    assert measured.keys() == BOUNDS.keys()
    assert {name: e for name, e in measured.items() if not e <= BOUNDS[name]} == {}


def test_neon_keeps_the_bounds_in_an_emulator(tmp_path: Path) -> None:
    within_bounds(errors("NEON", 20477, tmp_path))


@pytest.mark.parametrize("isa", ["AVX2", "NEON"])
def test_sets_with_fused_multiply_adds_draw_the_same_bits(isa: str, tmp_path: Path) -> None:
    if isa not in (*USABLE, "NEON") or USABLE == ["DEFAULT"]:
        pytest.skip("needs AVX2")
    listing = subprocess.run(build("noise", isa, tmp_path), check=True, capture_output=True).stdout
    seed = torch.tensor([0x123456789ABCDEF])
    drawn = torch.ops.fastvae.noise(seed, [1, 4096], 1, 0).flatten().view(torch.int32)
    assert [int(line) for line in listing.split()] == drawn.tolist()


def all_exponents(low: float, high: float, count: int = 400_000) -> Tensor:
    """float32 values of both signs, spread over the bit patterns, with |v| in [low, high]."""
    first, last = (torch.tensor(v).view(torch.int32).item() for v in (low, high))
    bits = torch.linspace(first, last, count, dtype=torch.float64).to(torch.int32)
    v = bits.view(torch.float32)
    return torch.cat([v, -v, torch.tensor([0.0, low, high, -low, -high])])


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    """The error of float32 values, in units of the last place of the exact result."""
    rounded = exact.float().abs().clamp_min(2.0**-126)
    spacing = torch.exp2(torch.floor(torch.log2(rounded.double())) - 23)
    same = (got == exact.float()) | (got.isnan() & exact.isnan())
    return torch.where(same, 0.0, (got.double() - exact).abs() / spacing)


def worst(got: Tensor, exact: Tensor, at: Tensor) -> tuple[float, float]:
    error = ulps(got, exact)
    index = int(error.argmax())
    return float(error[index]), float(at[index])


def bernoulli(l: Tensor, x: float) -> tuple[Tensor, Tensor]:
    value, (grad,) = forward(
        torch.full_like(l, x),
        [l],
        "bernoulli",
        [],
        None,
        None,
        1.0,
        [False, True, False, False, False],
    )
    return value, grad


LOGITS = all_exponents(1e-30, 1e4)
LOGVAR = all_exponents(1e-12, 88.0)


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_bernoulli_value_and_gradient(x: float) -> None:
    l = LOGITS.double()
    sign = 1.0 if x == 1 else -1.0
    value, grad = bernoulli(LOGITS, x)
    exact = -torch.logaddexp(-sign * l, torch.zeros((), dtype=torch.float64))
    assert worst(value, exact, LOGITS)[0] <= BOUND
    assert worst(grad, sign * torch.sigmoid(-sign * l), LOGITS)[0] <= BOUND


def kl(logvar: Tensor) -> tuple[Tensor, Tensor]:
    lv = logvar.clone().requires_grad_()
    value = fastvae.kl_divergence(torch.zeros_like(lv), lv)
    (grad,) = torch.autograd.grad(value.sum(), lv)
    return value.detach(), grad


def phi(d: Tensor) -> Tensor:
    """½ (e^d − 1 − d) in float64, by its series where that cancels."""
    series = sum(d**k / float(torch.tensor(k + 1.0).lgamma().exp()) for k in range(12, 1, -1))
    return 0.5 * torch.where(d.abs() < 0.1, series, d.expm1() - d)


def test_kl_near_and_far_from_the_prior() -> None:
    value, grad = kl(LOGVAR)
    assert (value >= 0).all()
    assert worst(value, phi(LOGVAR.double()), LOGVAR)[0] <= BOUND
    assert worst(grad, 0.5 * LOGVAR.double().expm1(), LOGVAR)[0] <= BOUND


def test_log_and_log1p_through_probabilities() -> None:
    p = all_exponents(1e-38, 1.0)
    p = p[p >= 0]
    for x, exact in ((1.0, p.double().log()), (0.0, (-p.double()).log1p())):
        value = fastvae.log_likelihood(p, torch.full_like(p, x), "bernoulli_probs")
        assert worst(value, exact.clamp_min(-100), p)[0] <= BOUND


@pytest.mark.parametrize(
    ("logvar", "kl_value"),
    [(float("-inf"), float("inf")), (200.0, float("inf")), (0.0, 0.0)],
)
def test_kl_at_the_ends(logvar: float, kl_value: float) -> None:
    assert kl(torch.full((3,), logvar))[0].tolist() == [kl_value] * 3


def test_nan_stays_nan() -> None:
    nan = torch.full((3,), float("nan"))
    functions: list[Callable[[], Tensor]] = [
        lambda: fastvae.kl_divergence(nan, torch.zeros(3)),
        lambda: fastvae.kl_divergence(torch.zeros(3), nan),
        lambda: fastvae.log_likelihood(nan, torch.zeros(3)),
        lambda: fastvae.log_likelihood(nan, torch.zeros(3), "gaussian"),
        lambda: fastvae.rsample(torch.zeros(3), nan),
    ]
    for f in functions:
        assert f().isnan().all()
