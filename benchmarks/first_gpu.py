"""`make gpu`: builds, tests and times fastvae on this machine's GPU, with what is installed here.

Needs torch with CUDA, Triton, pytest, pytest-benchmark, hypothesis and a C++ compiler; no network.
Every stage has a share of MINUTES and a log of its own; a stage that fails or runs out of time does
not keep the next from running. Everything is left in one folder, $OUT or build/gpu, the figures in
its summary.json.

    python benchmarks/first_gpu.py [--out FOLDER] [--rehearse]

--rehearse goes as far as a machine without a GPU can: the build, the tests' collection, and the
one sentence with which the benchmarks and the profile refuse (those of counts and classes end in
torch's).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINUTES = 9.0
# Minutes that the tests leave to what comes behind them, those in CUDA C++ to Triton's as well.
BENCHMARKS, TRITON = 3.5, 1.5
LEAST = 15  # seconds, below which a stage isn't begun
WORKERS = 14  # processes that test at once, at most, each of which keeps a context on the device

SMALL_STEPS = """
import torch
from benchmarks.profile_gpu import head
for shape in ((5, 20, 100), (3, 64, 5000)):
    step = head(shape, torch.float32, "cuda")
    step()
torch.cuda.synchronize()
"""
STEPS = "elbo and fp32 and not 8192x"


@dataclass
class Stage:
    name: str
    command: list[str]
    code: int
    seconds: float
    last_line: str  # of what it printed


def run(name: str, command: Sequence[str], out: Path, seconds: float) -> Stage:
    """Runs a command into `out`/name.log. Out of time, it is interrupted, so that pytest still
    reports; 20 seconds later it is killed."""
    print(f"{name}: {' '.join(command)}  (at most {seconds:.0f} s)", flush=True)
    log = out / f"{name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=environment_of_stages(),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        for patience, sign in ((seconds, signal.SIGINT), (20, signal.SIGKILL), (5, None)):
            try:
                process.wait(max(patience, 1))
                break
            except subprocess.TimeoutExpired:
                if sign is not None:
                    os.killpg(process.pid, sign)
    took = time.monotonic() - start
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    stage = Stage(name, list(command), process.returncode, took, lines[-1] if lines else "")
    print(f"  exit status {stage.code} after {took:.0f} s: {stage.last_line}", flush=True)
    return stage


def environment_of_stages() -> dict[str, str]:
    """Builds for this device alone, unless others are asked for."""
    import torch

    env = dict(os.environ)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        env.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    return env


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, object]:
    """What the figures belong to."""
    import torch

    found: dict[str, object] = {
        name: version(name)
        for name in ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "hypothesis")
    }
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    found["cpus"] = os.cpu_count()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    if driver := shutil.which("nvidia-smi"):
        query = [driver, "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem"]
        asked = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        found["driver"] = asked.stdout.strip()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(os.environ.get("OUT", ROOT / "build" / "gpu"))
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--rehearse", action="store_true", help="no GPU: as far as it goes")
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes

    print(json.dumps(machine := environment(), indent=1), flush=True)
    stages: list[Stage] = []
    figures: dict[str, object] = {}

    def stage(name: str, *command: str, keep: float = 0.0, program: str = sys.executable) -> int:
        """Leaves the later stages `keep` seconds."""
        left = end - time.monotonic() - keep
        if left < LEAST:
            print(f"{name}: left out, no time remains", flush=True)
            return 1
        whole = [program, *command] if program else [*command]
        stages.append(run(name, whole, out, left))
        if (made := out / f"{name}.json").exists():
            figures[name] = json.loads(made.read_text())
        summary = {"machine": machine, "stages": [asdict(s) for s in stages], "figures": figures}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return stages[-1].code

    keep = 60 * BENCHMARKS
    if stage("build", "setup.py", "build_ext", "--inplace", keep=keep) != 0:
        return 1
    tests = ["-m", "pytest", "--products", "all", "-m", "gpu", "-q", "--tb=short", "tests"]
    # pytest-benchmark, which no test uses, refuses to be configured beside xdist.
    tests += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    if options.rehearse:
        tests += ["--collect-only"]
    elif importlib.util.find_spec("xdist"):
        workers = max(1, min(WORKERS, (os.cpu_count() or 1) - 2))
        tests += ["--numprocesses", str(workers), "--dist", "worksteal"]
    # The kernels in CUDA C++ are compiled; each of Triton's cases compiles its own.
    for name, chosen, later in (("cuda", "not triton", TRITON), ("triton", "triton", 0.0)):
        xml = f"--junit-xml={out / f'tests-{name}.xml'}"
        stage(f"tests-{name}", *tests, "-k", chosen, xml, keep=keep + 60 * later)
    stage("graphs", "-m", "benchmarks.graphs", "--out", str(out / "graphs.json"))
    for name in ("counts", "samplers"):
        made = str(out / f"{name}.json")
        stage(name, "-m", f"benchmarks.{name}", "--device", "cuda", "--out", made)
    trace = str(ROOT / "build" / "trace.json")
    stage("profile", "-m", "benchmarks.profile_gpu", "--out", trace)
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable]
            stage(tool, *command, "-c", SMALL_STEPS, program="")
    stage("classes", "-m", "benchmarks.classes", "--device", "cuda")
    timing = ["-m", "pytest", "benchmarks", "--device", "cuda", "-k", STEPS, "-p", "no:xdist"]
    stage("steps", *timing, f"--benchmark-json={out / 'steps.json'}")
    if (picture := ROOT / "docs" / "gpu.png").exists() and not options.rehearse:
        shutil.copy(picture, out)
    return max(s.code != 0 for s in stages)  # what was left out is no failure


if __name__ == "__main__":
    sys.exit(main())
