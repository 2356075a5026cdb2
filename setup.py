"""Builds fastvae._C against the torch that is installed; everything else is in pyproject.toml."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent
PROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'version = "(.+)"', PROJECT).group(1)
OLDEST_TORCH = "2.10"
NO_CUDA = os.environ.get("FASTVAE_NO_CUDA") == "1"
ALL_FORMULAS = (ROOT / "csrc/formulas/all.h").read_text()
EAGER_ALONE = os.environ.get("FASTVAE_NO_EXTENSION") == "1"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# One source, compiled once per instruction set, each in its own namespace.
ISAS = {"DEFAULT": ["-DCPU_CAPABILITY_DEFAULT"]}
if X86:
    ISAS["AVX2"] = ["-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"]
    ISAS["AVX512"] = ["-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512dq"]
    ISAS["AVX512"] += ["-mavx512vl", "-mfma", "-mf16c"]
    # GCC 12 warns of its own intrinsics.
    ISAS["AVX512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# -ffp-contract=off: fused multiply-adds only where the source says so.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += [f'-DFASTVAE_VERSION="{VERSION}"', *(["-DFASTVAE_X86"] if X86 else [])]

# Compiled side by side. Most of an operator's time is torch's headers: two passes serve them all.
UNITS = {"unity_operators": [], "unity_module": []}
UNITS |= {f"cpu/kernels {isa}": [f"-DCPU_CAPABILITY={isa}", *ISAS[isa]] for isa in ISAS}

# The CUDA kernels: once per formula, and once for what belongs to none. -fmad=false is nvcc's
# -ffp-contract=off.
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-DCPU_CAPABILITY=CUDA",
]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wno-psabi", "--threads", "1"]
ARCHITECTURES = ("8.0", "9.0", "10.0")  # and PTX for later ones


def fail(sentence: str) -> None:
    sys.exit(f"fastvae: {sentence}")


def minor(version: str) -> list[int]:
    return [int(number) for number in version.split(".")[:2]]


def formulas() -> int:
    """How many there are: those named in the lists of csrc/formulas/all.h."""
    lists = re.findall(r"(?:Likelihoods|Divergences) = List<(.+?)>", ALL_FORMULAS, re.DOTALL)
    return sum(len(names.split(",")) for names in lists)


def nvcc_of(torch) -> str | None:
    """The compiler, where torch is a CUDA build, and its own release of CUDA is found."""
    from torch.utils.cpp_extension import CUDA_HOME

    if NO_CUDA or torch.version.cuda is None or CUDA_HOME is None:
        return None
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc.exists():
        return None
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)[1]
    if minor(release)[0] != minor(torch.version.cuda)[0]:
        print(f"fastvae: without kernels in CUDA C++, as nvcc is {release} and torch is for CUDA "
              f"{torch.version.cuda}; CUDA tensors will use Triton.", file=sys.stderr)  # fmt: skip
        return None
    return str(nvcc)


def architectures(nvcc: str, present: list[str]) -> list[str]:
    """Those asked for, as torch spells numbers ("8.0;9.0+PTX"), else ours that this nvcc knows, and
    of the devices present those of another major: a device runs its own major's lower minors."""
    asked = re.findall(r"[^ ;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if unknown := [a for a in asked if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", a)]:
        fail(f"TORCH_CUDA_ARCH_LIST takes numbers, such as 9.0 or 9.0+PTX, and has {unknown[0]!r}.")
    if asked:
        return asked
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    majors = {minor(a)[0] for a in ARCHITECTURES}
    wanted = {*ARCHITECTURES, *(a for a in present if minor(a)[0] not in majors)}
    ours = [a for a in sorted(wanted, key=minor)
            if f"compute_{a.replace('.', '')}" in known.stdout.split()]  # fmt: skip
    return [*ours[:-1], f"{ours[-1]}+PTX"]


def devices_of(torch) -> list[str]:
    """The architectures of the devices here; none where CUDA doesn't start."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)]
    except RuntimeError:
        return []


def targets(architectures: list[str]) -> list[str]:
    """nvcc's flags for them."""
    flags = []
    for arch in architectures:
        number = arch.removesuffix("+PTX").replace(".", "")
        kinds = ["sm", "compute"] if arch.endswith("+PTX") else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def extension() -> dict:
    building = {"build_ext", "build", "bdist_wheel", "install", "develop", "editable_wheel"}
    if EAGER_ALONE or not building & set(sys.argv):  # metadata needs neither torch nor a compiler
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        fail(
            "torch is missing here: install torch first, then `pip install . --no-build-isolation` "
            "(pip's isolated builds cannot see the torch you have)."
        )
    if minor(torch.__version__) < minor(OLDEST_TORCH):
        fail(f"torch {torch.__version__} is too old: {OLDEST_TORCH} is the oldest that will do.")
    # torch compiles with it: link with it, too.
    compiler = os.environ["CXX"] = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        fail(
            f"the C++ compiler `{compiler}` is missing: install it (Debian: apt install g++) "
            "or set CXX."
        )
    # An environment's ninja is found without activating it.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    if shutil.which("ninja") is None:
        fail("the build tool `ninja` is missing: pip install ninja.")

    nvcc = nvcc_of(torch)
    archs = architectures(nvcc, devices_of(torch)) if nvcc else []
    with_cuda = [f'-DFASTVAE_CUDA="{" ".join(archs)}"'] if nvcc else []

    def device_code(index: int | None, folder: str) -> str:
        """Compiles csrc/cuda for one formula, or what belongs to none; returns the object."""
        name = "kernels" if index is None else f"formula_{index}"
        made = Path(folder, f"cuda-{torch.version.cuda}", "_".join(archs), f"{name}.o")
        made.parent.mkdir(parents=True, exist_ok=True)
        sources = [*ROOT.glob("csrc/**/*.h"), ROOT / "csrc/cuda/kernels.cu", ROOT / "setup.py"]
        if made.exists() and made.stat().st_mtime > max(s.stat().st_mtime for s in sources):
            return str(made)
        of_one = [] if index is None else [f"-DFASTVAE_FORMULA={index}"]
        command = [nvcc, "-ccbin", compiler.split()[0], *NVCC_FLAGS, *targets(archs), *of_one]
        command += ["-c", "-o", str(made)]
        subprocess.run([*command, str(ROOT / "csrc/cuda/kernels.cu")], check=True)
        return str(made)

    class Build(BuildExtension):
        def build_extension(self, ext):
            def compiled(unit):
                source, *isa = unit.split()
                return self.compiler.compile(
                    [str(ROOT / f"csrc/{source}.cpp")],
                    output_dir=str(Path(self.build_temp, *isa or [source])),
                    include_dirs=ext.include_dirs,
                    extra_postargs={"cxx": ext.extra_compile_args["cxx"] + UNITS[unit] + with_cuda},
                    depends=ext.depends,
                )

            # torch has ninja compile what shares its flags: one file at a time, here.
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as threads:
                device = [None, *range(formulas())] if nvcc else []
                on_device = threads.map(lambda i: device_code(i, self.build_temp), device)
                for objects in threads.map(compiled, UNITS):
                    ext.extra_objects += objects
                ext.extra_objects += list(on_device)
            super().build_extension(ext)

    sources = [
        str(p.relative_to(ROOT))
        for p in ROOT.glob("csrc/**/*")
        if p.suffix in (".h", ".cpp", ".cu")
    ]
    kind = CppExtension
    if nvcc:
        from torch.utils.cpp_extension import CUDAExtension as kind
    module = kind(
        "fastvae._C",
        ["csrc/cpu/dispatch.cpp"],  # setuptools wants one to compile itself
        depends=["setup.py", *sorted(sources)],
        extra_compile_args={"cxx": FLAGS},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def requirement() -> str:
    """A wheel holds an extension, whose ABI is that of one minor version of torch."""
    built = {"bdist_wheel", "dist_info", "editable_wheel", "install", "develop"}
    if built & set(sys.argv) and not EAGER_ALONE:
        with suppress(PackageNotFoundError):  # then building fails, in a sentence
            return "torch=={}.{}.*".format(*minor(version("torch")))
    return f"torch>={OLDEST_TORCH}"


def description() -> str:
    """README.md for where the files that it links to are not: they are in the source archive."""

    def path_alone(link: re.Match) -> str:
        text, path = link.groups()
        return text if path.startswith("#") or text == path else f"{text} (`{path}`)"

    return re.sub(
        r"!?\[([^]]+)\]\((?!https?:)([^)]+)\)", path_alone, (ROOT / "README.md").read_text()
    )


if minor(setuptools.__version__) < [77]:
    fail(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'.")
setuptools.setup(
    install_requires=[requirement(), "typing-extensions"],
    long_description=description(),
    long_description_content_type="text/markdown",
    **extension(),
)
