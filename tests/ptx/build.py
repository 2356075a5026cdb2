"""Builds the extension with its CUDA kernels translated from their PTX: they run on CPU tensors.

    python tests/ptx/build.py FOLDER

leaves a copy of the package in FOLDER, whose operators take CPU tensors to the CUDA kernels, and
libcudart.so, the runtime without a device, to be loaded before all else:

    LD_PRELOAD=FOLDER/libcudart.so PYTHONPATH=FOLDER python -m pytest tests/test_elbo.py -k cpp
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

from translate import translate  # noqa: E402

UNOPTIMIZED = ("-std=c++20", "-O0", "-w", "-fPIC")
KERNELS = ROOT / "csrc/cuda/kernels.cu"


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"[-4000:])
    return done.stdout + done.stderr


@functools.cache
def setup() -> dict[str, Any]:
    """What setup.py defines: flags, and how many formulas there are."""
    namespace: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    source = (ROOT / "setup.py").read_text().split("\nif minor(setuptools.__version__)")[0]
    exec(compile(source, "setup.py", "exec"), namespace)
    return namespace


def formulas() -> int:
    count: int = setup()["formulas"]()
    return count


@functools.cache
def cuda_home() -> Path | None:
    """Where nvcc and its headers are."""
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes.append(Path("/usr/local/cuda"))
    complete = (h for h in homes if (h / "include/cuda_runtime_api.h").exists())
    return next((h for h in complete if (h / "bin/nvcc").exists()), None)


def nvcc(*args: object) -> str:
    home = cuda_home()
    assert home is not None, "nvcc is missing"
    return run(home / "bin/nvcc", *setup()["NVCC_FLAGS"], *args)


def of_formula(index: int | None) -> list[str]:
    """The flag for one formula; None: for what belongs to none."""
    return [] if index is None else [f"-DFASTVAE_FORMULA={index}"]


def ptx(index: int | None, to: Path) -> str:
    nvcc("-arch=sm_90", *of_formula(index), "-ptx", KERNELS, "-o", to)
    return to.read_text()


def assembled(index: int | None, to: Path, arch: str) -> str:
    """What the assembler says of registers and stacks."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return nvcc(target, *of_formula(index), "-Xptxas", "-v", "-cubin", KERNELS, "-o", to)


def cpp(source: Path, to: Path, *flags: str) -> Path:
    run("c++", "-std=c++20", "-fPIC", *flags, "-c", source, "-o", to)
    return to


def translated(text: str, to: Path) -> Path:
    """PTX as an object file."""
    source = to.with_suffix(".cpp")
    source.write_text(translate(text))
    return cpp(source, to, "-O1", "-w", f"-I{HERE}")


def header(to: Path) -> None:
    """Read once: that takes longer than a small kernel, and a kernel longer than it runs."""
    run("c++", *UNOPTIMIZED, "-x", "c++-header", HERE / "device.h", "-o", to)


def library(source: str, to: Path) -> None:
    """Translated PTX, to be loaded where the runtime is. device.h.gch is used if beside it."""
    text = to.with_suffix(".cpp")
    text.write_text(source)
    run("c++", *UNOPTIMIZED, "-shared", f"-I{HERE}", text, "-o", to)


def runtime(to: Path) -> Path:
    run("c++", "-std=c++20", "-O2", "-shared", "-fPIC", HERE / "cudart.cpp", "-ldl", "-o", to)
    return to


def build(folder: Path) -> None:
    import torch
    from torch.utils import cpp_extension

    home = cuda_home()
    # The CPU's kernels, of which one instruction set will do, are there to be linked.
    flags = [flag for flag in setup()["FLAGS"] if flag != "-DFASTVAE_X86"] + ["-O1"]
    flags += [f"-I{HERE / 'include'}", *(f"-I{p}" for p in cpp_extension.include_paths())]
    flags += [f"-I{home}/include", f"-I{sysconfig.get_paths()['include']}"]
    flags += ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"]
    flags += ['-DFASTVAE_CUDA="PTX"', "-DFASTVAE_CUDA_ON_CPU"]
    one_isa = ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]

    def of_cuda(index: int | None) -> list[Path]:
        name = folder / f"cuda_{index}"
        device, host = name.with_suffix(".o"), name.with_suffix(".host.o")
        nvcc("-arch=sm_90", *of_formula(index), "-c", KERNELS, "-o", host)
        return [host, translated(ptx(index, name.with_suffix(".ptx")), device)]

    def of_host(name: str) -> list[Path]:
        more = one_isa if name == "cpu/kernels" else []
        return [cpp(ROOT / f"csrc/{name}.cpp", folder / f"{Path(name).name}.o", *flags, *more)]

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as threads:
        names = ("cpu/kernels", "unity_operators", "unity_module", "cpu/dispatch")
        work = [threads.submit(of_host, name) for name in names]
        work += [threads.submit(of_cuda, index) for index in (None, *range(formulas()))]
        objects = [made for each in work for made in each.result()]
    package = folder / "fastvae"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fastvae", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    libraries += ["-ltorch_python", "-fopenmp"]
    run("c++", "-shared", *objects, runtime(folder / "libcudart.so"), *libraries, "-o", module)


def faulty(folder: Path, fault: str) -> Path:
    """A program that launches a kernel with that fault (faulty.cu), or with none."""
    name = folder / fault
    flags = ["-arch=sm_90", f"-DFAULT_{fault}", HERE / "faulty.cu"]
    nvcc(*flags, "-ptx", "-o", name.with_suffix(".ptx"))
    nvcc(*flags, "-c", "-o", name.with_suffix(".host.o"))
    device = translated(name.with_suffix(".ptx").read_text(), name.with_suffix(".o"))
    objects = [name.with_suffix(".host.o"), device, runtime(folder / "libcudart.so")]
    run("c++", *objects, f"-Wl,-rpath,{folder}", "-o", name)
    return name


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
