"""CONTRIBUTING.md's walk to a new likelihood, taken as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "fastvae", "tests", "setup.py", "pyproject.toml", "README.md")
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "build")
STEP = re.compile(
    r"(?:New\s+file\s+`(?P<new>[^`]+)`|In\s+`(?P<file>[^`]+)`,\s+(?P<side>above|below)\s+`(?P<at>[^`]+)`):"
    r"\n\n   ```\w+\n(?P<code>.*?)\n   ```\n",
    re.DOTALL,
)


def steps() -> list[re.Match[str]]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## A new likelihood")[1].split("\n## ")[0]
    found = [*STEP.finditer(section)]
    assert len(found) == section.count("   ```") // 2, "a block that no step introduces"
    return found


def take(step: re.Match[str], tree: Path) -> None:
    code = re.sub("(?m)^   ", "", step["code"]) + "\n"
    if step["new"]:
        (tree / step["new"]).write_text(code)
        return
    path = tree / step["file"]
    lines = path.read_text().splitlines(keepends=True)
    (at,) = (i for i, line in enumerate(lines) if step["at"] in line)
    lines.insert(at + (step["side"] == "below"), code)
    path.write_text("".join(lines))


def run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), **environment},
        capture_output=True,
        text=True,
    )


def test_a_family_is_added_by_the_steps_alone(tmp_path: Path) -> None:
    if not fastvae.backends()["cpp"].available:
        pytest.skip("needs a compiler")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part, **({"ignore": BUILT} if copy is shutil.copytree else {}))
    for step in steps():
        take(step, tmp_path)
    compiler = tmp_path / "quick-c++"  # its code is as right, in half the time
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O1\n')
    compiler.chmod(0o755)
    built = run(tmp_path, "setup.py", "--quiet", "build_ext", "--inplace", CXX=str(compiler))
    assert built.returncode == 0, built.stderr[-4000:]
    files = [f"tests/test_{n}.py" for n in ("build", "likelihood", "triton", "ops", "properties")]
    chosen = "(laplace or same_families or oracle) and not instruction_set"
    done = run(
        tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files,
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 100
