"""Compiles every source, but for its code, against the headers in a wheel of torch."""

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"DEFAULT": []}
if X86:
    ISAS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        include = Path(folder, "torch/include")
        archive.extractall(folder, [n for n in archive.namelist() if n.startswith("torch/include")])
        includes = [include, include / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", "-fopenmp", "-Wall"]
        command += ["-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", "-DTORCH_EXTENSION_NAME=_C"]
        command += ['-DFASTVAE_VERSION=""', *(["-DFASTVAE_X86"] if X86 else [])]
        command += [f"-isystem{path}" for path in includes]
        units = [[str(p)] for p in sorted((ROOT / "csrc").glob("**/*.cpp"))]
        (kernels,) = (u for u in units if u[0].endswith("kernels.cpp"))
        units.remove(kernels)
        for isa, flags in ISAS.items():
            units.append([*kernels, f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}", *flags])
        units = [
            u for u in units if "unity_" in u[0] or Path(u[0]).parent.name == "cpu"
        ]  # those include the rest
        expected = 3 + len(ISAS)
        if (cuda := Path("/usr/local/cuda/include")).exists():  # the wheel's torch is one for CUDA
            module = str(ROOT / "csrc/unity_module.cpp")
            units.append([module, '-DFASTVAE_CUDA=""', f"-isystem{cuda}"])
            expected += 1
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            codes = list(threads.map(lambda unit: subprocess.call(command + unit), units))
    assert len(units) == expected
    sys.exit(max(codes))


main(*sys.argv[1:])
