"""The Triton kernels without a GPU, from compiled code: what Triton makes of them is read, and its
PTX is executed on CPU tensors (tests/ptx), as that of the kernels in CUDA C++ is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cases import REPRESENTATIVES

pytest.importorskip("triton", reason="needs Triton")

from fastvae._triton.formulas import elements, likelihoods, sites

TESTS = Path(__file__).parent
PTX = TESTS / "ptx"
pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton.backends.nvidia") is None, reason="needs Triton's PTX"
    ),
    pytest.mark.usefixtures("native"),
]

# Compiling is what takes the time: each thing is chosen once, and what compiles to the same.
WIDE = ("float64", "float32")
CHOSEN = [
    # every family, the value alone and with its gradients
    *(
        f"likelihood::test_x_of_another_dtype[triton-{d}-{d}-{f}]"
        for d in WIDE
        for f in likelihoods
    ),
    *(
        f"likelihood::test_x_of_another_dtype[triton-bfloat16-bfloat16-{family}]"
        for family in ("bernoulli", "gaussian_logvar", "categorical")
    ),
    # masks, weights, draws and a prior
    *(f"elbo::test_everything_at_once[triton-float32-{f}]" for f in REPRESENTATIVES),
    "elbo::test_everything_at_once[triton-float64-bernoulli]",
    "elbo::test_a_large_batch",
    "categorical::test_a_mask_and_ignore_index_leave_out_nan",
    # rows that are split
    *(
        f"likelihood::test_every_shape[triton-None-odd_5001-{f}]"
        for f in ("bernoulli", "categorical")
    ),
    "kl_divergence::test_kl_every_shape[triton-odd_5001-rsample_kl]",
    # an element a row, over the whole range
    "likelihood::test_confident_logits_keep_their_relative_accuracy",
    "likelihood::test_extreme_probs[triton-float32-bernoulli_probs]",
    "counts::test_within_four_roundings_of_the_largest_term[triton-poisson_log]",
    "counts::test_within_four_roundings_of_the_largest_term[triton-zero_inflated_negative_binomial]",
    # the latent's kernels
    *(
        f"kl_divergence::test_kl_with_a_prior[triton-((17,), (3, 1))-{d}-kl_divergence]"
        for d in WIDE
    ),
    *(
        f"kl_divergence::test_kl_every_dtype_and_layout[triton-contiguous-{case}]"
        for case in ("float64-kl_divergence", "float32-kl_divergence", "bfloat16-rsample_kl")
    ),
    "latent::test_each_row_draws_the_noise_of_its_index[triton-13-3-rsample_kl]",
    "latent::test_each_row_draws_the_noise_of_its_index[triton-64-3-rsample]",
    "latent::test_sample_rows_of_whole_counters[triton-float64-rsample_kl]",
    "latent::test_sample_rows_of_whole_counters[triton-bfloat16-rsample]",
    *(
        f"latent::test_sample_every_dtype_and_layout[triton-contiguous-{d}-rsample_kl]"
        for d in WIDE
    ),
    "sampling::test_rsample_draws_that_noise",
]
# Those in which threads meet most.
MEETING = ("bernoulli", "categorical", "latent", "large_batch", "odd_5001")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton_ptx")


def emulated(folder: Path, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Python, whose kernels are compiled: the interpreter is chosen as they are built."""
    path = os.pathsep.join([str(PTX), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = {**os.environ, "TRITON_INTERPRET": "0", "EMULATOR_FOLDER": str(folder), **more}
    env["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, *args], cwd=TESTS.parent, env=env, text=True, capture_output=True
    )


def passed(folder: Path, chosen: list[str], *more: str, **env: str) -> int:
    """How many tests passed; all must."""
    names = [str(TESTS / "test_{}.py::{}".format(*name.split("::"))) for name in chosen]
    flags = ["-q", "-p", "triton_launcher", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    flags += ["--capture", "sys", "-k", "triton"]  # a fault is said in C++
    done = emulated(folder, "-m", "pytest", *flags, *more, *names, **env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None, done.stdout[-2000:]
    return int(found[1])


def launches(folder: Path) -> Counter[str]:
    """And forgets them."""
    total: Counter[str] = Counter()
    for path in folder.glob("*.json"):
        total += Counter(json.loads(path.read_text()))
        path.unlink()
    return total


def test_values_and_gradients(folder: Path) -> None:
    at_once = ("-n", "2", "--dist", "loadfile")  # within a file more compiles to the same
    assert passed(folder, CHOSEN, *at_once) >= len(CHOSEN)
    launched = launches(folder)
    assert launched.total() > 200
    for compute in ("fp32", "fp64"):
        wanted = {f"rowwise_kernel {kl} {compute} gradients" for kl in ("standard_kl", "normal_kl")}
        for kernel, families in (("rowwise_kernel", elements), ("sites_kernel", sites)):
            values = {f"{kernel} {family} {compute}" for family in families}
            wanted |= values | {f"{value} gradients" for value in values}
        for way in ("", "backward_"):
            wanted |= {f"sample_{way}kernel {compute} four", f"sample_stream_{way}kernel {compute}"}
            wanted |= {f"sample_{way}kernel fp32"}  # row by row: a sample_index, or several draws
        wanted |= {f"scale_grad_kernel {compute}", "elbo_reduce_kernel"}
        assert wanted - set(launched) == set()


def test_the_order_of_threads_does_not_matter(folder: Path) -> None:
    """Threads, warps and programs from the last to the first."""
    chosen = [name for name in CHOSEN if any(word in name for word in MEETING)]
    assert passed(folder, chosen, EMULATOR_BACKWARDS="1") >= len(chosen) > 20
    assert launches(folder).total() > 100


def test_approximate_instructions_may_be_off(folder: Path) -> None:
    """By two units in the last place: what a GPU's division and 1/√ may be. Not by eight."""
    chosen = [name for name in CHOSEN if "float64" not in name]
    for error in ("2", "-2"):
        assert passed(folder, chosen, EMULATOR_ERROR=error) >= len(chosen) > 25
    (sensitive,) = (name for name in chosen if "x_of" in name and name.endswith("-poisson]"))
    with pytest.raises(AssertionError, match="1 failed"):
        passed(folder, [sensitive], EMULATOR_ERROR="8")


def test_faults_are_found(folder: Path) -> None:
    """The other side: a kernel that leaves its tensor, or says that it is aligned and is not."""
    right, outside, misaligned = (
        emulated(folder, str(PTX / "faulty_kernel.py"), start) for start in ("4", "100", "2")
    )
    assert right.returncode == 0, right.stderr
    for done, said in (
        (outside, "access outside of any tensor"),
        (misaligned, "misaligned access"),
    ):
        assert done.returncode != 0 and f"{said} of 16 bytes" in done.stderr, done.stderr
