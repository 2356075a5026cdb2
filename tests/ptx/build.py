"""Builds the extension with its CUDA kernels translated from their PTX: they run on CPU tensors.

    python tests/ptx/build.py FOLDER

leaves a copy of the package in FOLDER, whose operators take CPU tensors to the CUDA kernels, and
libcudart.so, the runtime without a device, to be loaded before all else:

    LD_PRELOAD=FOLDER/libcudart.so PYTHONPATH=FOLDER python -m pytest tests/test_likelihood.py -k cpp
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

from translate import translate  # noqa: E402

ARCH = "sm_90"


def run(*command: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"[-4000:])


def cuda_home() -> Path | None:
    """Where nvcc and its headers are."""
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += [Path("/usr/local/cuda")]
    return next((h for h in homes if (h / "include/cuda_runtime_api.h").exists()), None)


def build(folder: Path) -> None:
    import torch
    from torch.utils import cpp_extension

    namespace = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    source = (ROOT / "setup.py").read_text().split("\nif minor(setuptools.__version__)")[0]
    exec(compile(source, "setup.py", "exec"), namespace)
    home = cuda_home()
    assert home is not None, "nvcc is missing"
    nvcc = [home / "bin/nvcc" if (home / "bin/nvcc").exists() else "nvcc"]
    nvcc += [*namespace["NVCC_FLAGS"], f"-arch={ARCH}", "-diag-suppress", "128,177"]
    kernels = ROOT / "csrc/cuda/kernels.cu"

    def of_cuda(index: int | None) -> list[Path]:
        name = folder / f"cuda_{index}"
        define = [] if index is None else [f"-DFASTVAE_FORMULA={index}"]
        run(*nvcc, *define, "-ptx", kernels, "-o", name.with_suffix(".ptx"))
        run(*nvcc, *define, "-c", kernels, "-o", name.with_suffix(".host.o"))
        name.with_suffix(".cpp").write_text(translate(name.with_suffix(".ptx").read_text()))
        compile_cpp(name.with_suffix(".cpp"), name.with_suffix(".o"), "-O1", "-w", f"-I{HERE}")
        return [name.with_suffix(".host.o"), name.with_suffix(".o")]

    # The CPU's kernels, of which one instruction set will do, are there to be linked.
    plain = [flag for flag in namespace["FLAGS"] if flag != "-DFASTVAE_X86"] + ["-O1"]
    flags = [f"-I{p}" for p in cpp_extension.include_paths()] + [f"-I{home / 'include'}"]
    flags += [f"-I{sysconfig.get_paths()['include']}", "-fPIC", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    flags += ["-DTORCH_EXTENSION_NAME=_C", '-DFASTVAE_CUDA="PTX"', "-DFASTVAE_CUDA_ON_CPU"]

    def compile_cpp(source: Path, made: Path, *more: str) -> Path:
        run("c++", "-std=c++20", *more, "-fPIC", "-c", source, "-o", made)
        return made

    def of_torch(name: str) -> list[Path]:
        more = [*plain, f"-I{HERE / 'include'}", *flags]
        return [compile_cpp(ROOT / f"csrc/{name}.cpp", folder / f"{Path(name).name}.o", *more)]

    def of_isa() -> list[Path]:
        more = [*plain, *flags, "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]
        name = folder / "cpu.o"
        return [compile_cpp(ROOT / "csrc/cpu/kernels.cpp", name, *more)]

    folder.mkdir(parents=True, exist_ok=True)
    lib = Path(torch.__file__).parent / "lib"
    with ThreadPoolExecutor(2) as threads:
        work = [threads.submit(of_isa)]
        work += [
            threads.submit(of_torch, name)
            for name in ("unity_operators", "unity_module", "cpu/dispatch")
        ]
        work += [threads.submit(of_cuda, i) for i in (None, *range(namespace["formulas"]()))]
        objects = [o for w in work for o in w.result()]
    runtime = folder / "libcudart.so"
    run("c++", "-std=c++20", "-O2", "-shared", "-fPIC", HERE / "cudart.cpp", "-ldl", "-o", runtime)
    package = folder / "fastvae"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fastvae", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-fopenmp"]
    run("c++", "-shared", *objects, runtime, f"-L{lib}", *libraries, "-o", module)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
