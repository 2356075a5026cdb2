"""Every Triton kernel compiled ahead of time, for GPUs that need not be here: what it spills, how
wide its accesses are, how many bytes it moves. Values are the interpreter's business."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")

from fastvae._triton.formulas import elements, heavy

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KERNELS = [
    *(
        name + suffix
        for name in (*elements, "standard_kl", "normal_kl")
        for suffix in ("", "+grad")
    ),
    "rsample",
    "rsample_kl",
    "rsample_kl_backward",
    "scale_grad",
]
# The interpreter is chosen as kernels are built, so compiling needs processes of its own.
COMPILING = {**os.environ, "TRITON_INTERPRET": "0"}
artefacts = pytest.mark.parametrize("arch", ARCHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)

Rows = list[dict[str, Any]]


def compiling(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *args], env=COMPILING, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """{"aligned", "variants"}: the rows of the roofline report, from two processes at once."""
    folder: Path = tmp_path_factory.mktemp("aot")
    few = [d for d in DTYPES if d != "float16"]  # compiles as bfloat16 does
    extra = {"aligned": [], "variants": ["--variants", "--dtype", *few]}
    running = {
        name: compiling("-m", "fastvae.roofline", "--json", str(folder / name), *flags)
        for name, flags in extra.items()
    }
    rows = {}
    for name, process in running.items():
        output, _ = process.communicate()
        assert process.returncode == 0, output[-4000:]
        rows[name] = json.loads((folder / name).read_text())
    return rows


def select(rows: Rows, arch: str, dtype: str) -> Rows:
    return [row for row in rows if row["arch"] == arch and row["dtype"] == dtype]


def is_narrow(row: dict[str, Any]) -> bool:
    """Half a tile of 16-bit numbers is 64 bits a thread: arithmetic bounds those kernels."""
    bound = row["case"].removesuffix("+grad") in heavy or row["case"] == "rsample_kl_backward"
    return bound and row["dtype"].endswith("16")


@artefacts
@dtypes
def test_every_kernel_is_compiled(compiled: dict[str, Rows], arch: str, dtype: str) -> None:
    assert [row["case"] for row in select(compiled["aligned"], arch, dtype)] == KERNELS
    assert len(select(compiled["variants"], arch, dtype)) == (0 if dtype == "float16" else 16)


@artefacts
@dtypes
@pytest.mark.parametrize("which", ["aligned", "variants"])
def test_nothing_spills(compiled: dict[str, Rows], arch: str, dtype: str, which: str) -> None:
    rows = select(compiled[which], arch, dtype)
    spills = {row["case"]: row["spilled_bytes"] for row in rows if row["spilled_bytes"]}
    # The value alone of the longest formula: up to 16 bytes, of kernels that arithmetic bounds.
    assert spills.pop("zero_inflated_negative_binomial", 0) <= 16
    assert spills == {}
    assert all(row["registers"] > 0 for row in rows)


def rounded_to_float32(number: float) -> bool:
    """Whether it has a float32's 24 bits and needs more than 12: a literal that lost the others."""
    mantissa = math.frexp(number)[0]
    return (mantissa * 2**24).is_integer() and not (mantissa * 2**12).is_integer()


def assert_doubles_are_whole(rows: Rows) -> None:
    """Triton takes some literals for float32: those in a tuple that is given a name, and before 3.9
    those that stand alone in a call. The interpreter, where values are tested, takes none."""
    found = {row["case"]: row["doubles"] for row in rows}
    for case, doubles in found.items():
        assert [d for d in doubles if rounded_to_float32(d)] == [], case
    assert {1 / 6, 1 / math.factorial(20)} < set(found["standard_kl+grad"])
    assert 1e-12 in found["bernoulli_probs+grad"]


@artefacts
def test_no_constant_of_float64_is_a_rounded_float32(compiled: dict[str, Rows], arch: str) -> None:
    for number in (1 / 6, 1e-12, -100 / 3):
        lost = struct.unpack("f", struct.pack("f", number))[0]
        assert rounded_to_float32(lost) and not rounded_to_float32(number)
    rows = [*compiled["aligned"], *compiled["variants"]]
    assert_doubles_are_whole(select(rows, arch, "float64"))


@artefacts
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_float64_is_kept_out_of_other_kernels(
    compiled: dict[str, Rows], arch: str, dtype: str
) -> None:
    rows = [*compiled["aligned"], *compiled["variants"]]
    found = {row["case"]: row["doubles"] for row in select(rows, arch, dtype) if row["doubles"]}
    assert {case.split()[0] for case in found} <= {"elbo_reduce"}


@artefacts
@dtypes
def test_the_designed_bytes_move_in_128_bit_accesses(
    compiled: dict[str, Rows], arch: str, dtype: str
) -> None:
    for row in select(compiled["aligned"], arch, dtype):
        wanted = 0 if is_narrow(row) else row["designed_bytes"]
        assert row["bytes"] == wanted and row["designed_bytes"] > 0, row["case"]


@artefacts
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float16"])
def test_planes_are_read_and_written_128_bits_at_a_time(
    compiled: dict[str, Rows], arch: str, dtype: str
) -> None:
    """Of neighbouring sites, one plane after the other; no other width but the sums'."""
    for row in select(compiled["variants"], arch, dtype):
        if row["case"].startswith("categorical"):
            widths = {width for _, width, _ in row["accesses"]}
            assert widths == {16, 8 if dtype == "float64" else 4}, row["case"]
            (sums,) = (n for kind, width, n in row["accesses"] if width != 16)
            assert sums == 1


def test_the_row_kernel_makes_one_pass(compiled: dict[str, Rows]) -> None:
    """x and the logits in, the gradient out: three float32 numbers an element."""
    (row,) = (
        row
        for row in select(compiled["aligned"], "sm_90", "float32")
        if row["case"] == "bernoulli+grad"
    )
    assert row["bytes"] == 12
    assert 20 < row["instructions"] < 106  # fewer than an H100 issues while its memory moves them


def test_unaligned_rows_are_not_vectors(compiled: dict[str, Rows]) -> None:
    """The other side of the test above: 785 columns can't be."""
    (row,) = (
        row for row in select(compiled["variants"], "sm_90", "float32") if row["case"] == "masked"
    )
    assert row["bytes"] == 0


def test_one_kernel_serves_all_numbers() -> None:
    """β that grows from 0, and a batch whose 1 / size has other bits, must not compile again."""
    code = """
from functools import partial
import torch
from fastvae import _triton, roofline
from fastvae._triton.aot import compile_launches

t = roofline.Shapes(torch.float64)
def reduce(beta, scale):
    outs = (t.row(1).view(()) for _ in range(3))
    _triton.elbo_reduce(t.matrix(1000, 8), t.row(1000), None, beta, scale, *outs)
def rowwise(beta, scale):
    given, grads = [t.matrix(64), t.matrix(64)], [t.matrix(64)]
    _triton.rowwise(
        "gaussian", given, None, None, [1.0, 0.5], scale, 2048, t.row(), grads, [False, True]
    )
for run in (reduce, rowwise):
    for numbers in ((0.0, 1.0), (0.1, 1 / 64), (1.0, 1 / 60), (2.0, 0.0)):
        (built,) = compile_launches("sm_90", partial(run, *numbers))
        print(built.kernel, built.variant)
"""
    process = compiling("-c", code)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    lines = output.splitlines()
    assert len(lines) == 8 and len(set(lines)) == 2, output


def test_spills_are_seen() -> None:
    """The other side of that test: a tile of 8 times the size does not fit the registers."""
    code = """
import fastvae._triton.launch as launch, fastvae._triton.sampling as sampling
sampling.TILE = launch.TILE = 8 * launch.TILE
sampling.ENOUGH = 1
import torch
from fastvae import roofline
for arch in ("sm_90", "gfx942"):
    (case,) = (c for c in roofline.cases(torch.float32) if c.name == "rsample_kl")
    print(roofline.measure(case, arch, "float32").spilled_bytes)
"""
    process = compiling("-c", code)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert all(int(line) > 0 for line in output.split()), output
    assert len(output.split()) == 2


@pytest.mark.skipif("OLDEST_TRITON" not in os.environ, reason="make test-all installs Triton 3.6.0")
def test_the_oldest_triton_passes(tmp_path: Path) -> None:
    """The other end of the supported range: values of everything elbo is made of, and artefacts."""
    path = os.pathsep.join([os.environ["OLDEST_TRITON"], os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}

    def run(*args: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, *args], env={**env, **more}, capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    assert run("-c", "import triton; print(triton.__version__)").strip() == "3.6.0"
    tests = Path(__file__).parent
    names = ("test_triton.py", "test_triton_launch.py", "test_elbo.py", "test_parity.py")
    files = [str(tests / name) for name in names]
    run("-m", "pytest", "-qxp", "no:cacheprovider", "-k", "triton", *files, TRITON_INTERPRET="1")
    out = tmp_path / "rows"
    few = ["--arch", "sm_80", "gfx942", "--dtype", "float32", "bfloat16", "--json", str(out)]
    run("-m", "fastvae.roofline", *few, TRITON_INTERPRET="0")
    rows = json.loads(out.read_text())
    assert len(rows) == 4 * len(KERNELS)
    for row in rows:
        assert row["spilled_bytes"] <= (16 if "zero_inflated" in row["case"] else 0), row
        assert row["bytes"] == (0 if is_narrow(row) else row["designed_bytes"]), row
    few = ["--arch", "sm_80", "--dtype", "float64", "--json", str(out)]
    run("-m", "fastvae.roofline", *few, TRITON_INTERPRET="0")
    assert_doubles_are_whole(json.loads(out.read_text()))
    # Its compiler takes less Python than its interpreter, and than today's compiler.
    few = ["--variants", "--arch", "sm_90", "--dtype", "float32", "--json", str(out)]
    run("-m", "fastvae.roofline", *few, TRITON_INTERPRET="0")
    cases = [row["case"] for row in json.loads(out.read_text())]
    assert {"categorical", "categorical+grad"} < set(cases)


def test_report_says_that_it_predicts() -> None:
    arguments = ["--arch", "sm_90", "--dtype", "bfloat16", "--case", "gaussian+grad"]
    process = compiling("-m", "fastvae.roofline", *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "sm_90: PREDICTED for H100" in output
    (line,) = (line for line in output.splitlines() if line.startswith("gaussian+grad"))
    assert line.split()[1:3] == ["bfloat16", "6.0"]
    assert "memory" in line or "issue" in line


def test_report_refuses_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvae.roofline"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr
