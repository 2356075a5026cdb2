"""Builds fastvae._C against the torch that is installed; everything else is in pyproject.toml."""

import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'version = "(.+)"', (ROOT / "pyproject.toml").read_text()).group(1)
X86 = platform.machine().lower() in ("x86_64", "amd64")

# One source, compiled once per instruction set, each in its own namespace.
ISAS = {"DEFAULT": ["-DCPU_CAPABILITY_DEFAULT"]}
if X86:
    ISAS["AVX2"] = ["-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"]
    ISAS["AVX512"] = [
        "-DCPU_CAPABILITY_AVX512",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
    ]
    ISAS["AVX512"] += [
        "-mfma",
        "-mf16c",
        "-Wno-uninitialized",
    ]  # GCC 12 warns of its own intrinsics

# -ffp-contract=off: fused multiply-adds only where the source says so.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
]
FLAGS += [
    "-fno-trapping-math",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    f'-DFASTVAE_VERSION="{VERSION}"',
]
FLAGS += ["-DFASTVAE_X86"] if X86 else []


def fail(sentence: str) -> None:
    sys.exit(f"fastvae: {sentence}")


def extension() -> dict:
    if os.environ.get("FASTVAE_NO_EXTENSION") == "1":  # the eager backend alone
        return {}
    building = {"build_ext", "build", "bdist_wheel", "install", "develop", "editable_wheel"}
    if not building & set(sys.argv):  # metadata needs neither torch nor a compiler
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        fail(
            "torch is missing here: install torch first, then `pip install . --no-build-isolation` "
            "(pip's isolated builds cannot see the torch you have)."
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        fail(
            f"the C++ compiler `{compiler}` is missing: install it (Debian: apt install g++) "
            "or set CXX."
        )
    # An environment's ninja is found without activating it.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    if shutil.which("ninja") is None:
        fail("the build tool `ninja` is missing: pip install ninja.")

    class Build(BuildExtension):
        def build_extension(self, ext):
            def kernels(isa):
                return self.compiler.compile(
                    [str(ROOT / "csrc/cpu/kernels.cpp")],
                    output_dir=str(Path(self.build_temp) / isa),
                    include_dirs=ext.include_dirs,
                    extra_postargs={"cxx": [*FLAGS, f"-DCPU_CAPABILITY={isa}", *ISAS[isa]]},
                    depends=ext.depends,
                )

            # Each is one file, that ninja alone would compile after the other.
            with ThreadPoolExecutor(min(len(ISAS), os.cpu_count() or 1)) as threads:
                for objects in threads.map(kernels, ISAS):
                    ext.extra_objects += objects
            super().build_extension(ext)

    sources = [
        "ops",
        "common",
        "memory",
        "rowwise",
        "rsample",
        "kl_divergence",
        "log_likelihood",
        "elbo",
        "nonfinite",
        "triton",
        "python",
    ]
    sources += ["cpu/dispatch"]
    module = CppExtension(
        "fastvae._C",
        [f"csrc/{name}.cpp" for name in sources],
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")],
        extra_compile_args={"cxx": FLAGS},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())
