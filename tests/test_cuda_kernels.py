"""The kernels in CUDA C++ without a GPU: what nvcc makes of them is read, and its PTX is executed
on CPU tensors (tests/ptx), by the tests of values and gradients that every backend passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PTX = Path(__file__).parent / "ptx"
sys.path.insert(0, str(PTX))

import build  # noqa: E402

pytestmark = [
    pytest.mark.skipif(build.cuda_home() is None, reason="needs nvcc"),
    pytest.mark.usefixtures("native"),
]
ARCHS = ("80", "90", "100")
# What the operators compute. Domains are not looked at on a device.
FILES = ("likelihood", "likelihood_gradients", "latent", "kl_divergence", "elbo", "counts", "ops")
FILES += ("categorical", "extremes", "sampling", "weights", "inplace", "parity", "theory")
FILES += ("jensen", "distributions", "reproducibility")
SELECTED = "cpp and not outside_the_domain and not x_that_is_no_class"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python with an extension whose operators take CPU tensors to the CUDA kernels."""
    folder = tmp_path_factory.mktemp("ptx")
    build.build(folder)

    def run(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(folder), "FASTVAE_CACHE": "0", **more}
        env["LD_PRELOAD"] = str(folder / "libcudart.so")
        return subprocess.run(
            [sys.executable, *args], cwd=folder, env=env, text=True, capture_output=True
        )

    return run


def passed(run: Run, files: tuple[str, ...], **more: str) -> int:
    """How many tests passed; all must."""
    names = [str(PTX.parent / f"test_{name}.py") for name in files]
    root = ["-c", str(PTX.parents[1] / "pyproject.toml")]
    flags = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-n", "2", "-k", SELECTED]
    done = run("-m", "pytest", *root, *flags, *names, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None, done.stdout[-2000:]
    return int(found[1])


def test_the_compiled_kernels_run(emulated: Run) -> None:
    """Not the CPU's in their place: launches are counted."""
    code = """
import ctypes, os, torch, fastvae
launches = ctypes.CDLL(os.environ["LD_PRELOAD"]).emulator_launches
assert fastvae.__file__.startswith(os.getcwd()), fastvae.__file__
before = launches()
mu, logvar, logits = (torch.randn(3, n, requires_grad=True) for n in (5, 5, 40))
z, kl = fastvae.rsample_kl(mu, logvar)
loss = fastvae.elbo_loss(logits, torch.rand(3, 40), kl=kl)
loss.backward()
print(launches() - before)
"""
    done = emulated("-c", code)
    assert done.returncode == 0, done.stderr
    assert (
        int(done.stdout) == 5
    )  # sample, rows, reduction; the gradient's factor, sample's backward


def test_values_and_gradients(emulated: Run) -> None:
    assert passed(emulated, FILES) > 4000


def test_the_order_of_threads_does_not_matter(emulated: Run) -> None:
    """Threads, warps and blocks from the last to the first: what one reads before another has
    written it, for want of a barrier, differs."""
    files = ("likelihood_gradients", "latent", "counts", "categorical")
    assert passed(emulated, files, EMULATOR_BACKWARDS="1") > 400


@pytest.mark.parametrize("fault", ["outside", "misaligned", "parted", "unsynchronized"])
def test_faults_are_found(fault: str, tmp_path: Path) -> None:
    """The other side: kernels that do what they must not."""
    program = build.faulty(tmp_path, fault)
    done = subprocess.run([program], capture_output=True, text=True)
    said = {"outside": "outside of any tensor", "misaligned": "misaligned access"}
    said |= {"parted": "parted where its threads meet", "unsynchronized": "wrong"}
    assert done.returncode != 0 and said[fault] in done.stderr, done.stderr
    assert subprocess.run([build.faulty(tmp_path, "none")], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, architecture) -> registers, bytes of the stack."""
    folder = tmp_path_factory.mktemp("sass")
    units = [(i, arch) for i in (None, *range(build.formulas())) for arch in ARCHS]

    def compiled(unit: tuple[int | None, str]) -> str:
        index, arch = unit
        return build.assembled(index, folder / f"{index}_{arch}.cubin", arch)

    found = {}
    with ThreadPoolExecutor(2) as threads:
        for (_, arch), text in zip(units, threads.map(compiled, units), strict=True):
            entry = r"function '(\w+)' for .*?(\d+) bytes stack frame.*?Used (\d+) registers"
            for kernel, stack, registers in re.findall(entry, text, re.S):
                found[kernel, arch] = int(registers), int(stack)
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(usage: dict[tuple[str, str], tuple[int, int]], arch: str) -> None:
    of_arch = {kernel: used for (kernel, a), used in usage.items() if a == arch}
    assert len(of_arch) == 4 * 10 + 2 * 5 + 6 + 12 + 5  # rows, columns, sites; latents; the rest
    spills = {kernel: stack for kernel, (_, stack) in of_arch.items() if stack}
    assert spills == {}
    for kernel, (registers, _) in of_arch.items():
        # float32 of formulas that pack nothing: four blocks of 256 threads on a multiprocessor
        packs = any(name in kernel for name in ("Poisson", "NegativeBinomial"))
        if "rowwise_kernel" in kernel and "EfLb" in kernel and not packs:
            assert registers <= 64, kernel


def test_accesses_have_128_bits(tmp_path: Path) -> None:
    ptx = build.ptx(0, tmp_path / "bernoulli.ptx")
    kernels = re.findall(r"\.entry (\w+)(.*?)\n}\n", ptx, re.S)
    (body,) = (text for name, text in kernels if "EfLb1E" in name)
    assert body.count("ld.global.v4.u32") == 2  # x, the logits
    assert body.count("st.global.v4.f32") == 2  # their gradients
