"""Setting up: what is missing or too old is said in one sentence, and what the package declares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import torch
from ptx.build import setup

from fastvae._backends import cpp

ROOT = Path(__file__).parent.parent
MINOR = ".".join(torch.__version__.split(".")[:2])


def setup_py(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "FASTVAE_NO_EXTENSION")}
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=ROOT, env={**inherited, **env},
        capture_output=True, text=True,
    )  # fmt: skip


def refusal(tmp_path: Path, **env: str) -> str:
    """What building ends in: its last line, and no traceback."""
    done = setup_py("build_ext", "-b", str(tmp_path), "-t", str(tmp_path), **env)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def put(folder: Path, **modules: str) -> str:
    """Modules of that text, for PYTHONPATH; a name's "__" are its dots."""
    for name, text in modules.items():
        package = folder.joinpath(*name.split("__"))
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
    return str(folder)


@pytest.mark.parametrize("env", [{"CXX": "no-such-compiler"}, {"PATH": "/nowhere"}], ids=str)
def test_without_a_compiler(env: dict[str, str], tmp_path: Path) -> None:
    # torch calls c++ where CXX is not set.
    name = env.get("CXX", "c++")
    line = refusal(tmp_path, **env)
    assert line.startswith(f"fastvae: the C++ compiler `{name}` is missing: ")


def test_without_torch(tmp_path: Path) -> None:
    path = put(tmp_path, torch="raise ImportError('no torch')")
    assert refusal(tmp_path, PYTHONPATH=path).startswith("fastvae: torch is missing here: ")


def test_torch_too_old_to_build_against(tmp_path: Path) -> None:
    extension = "BuildExtension = CppExtension = object"
    path = put(
        tmp_path, torch="__version__ = '2.9.1+cpu'", torch__utils="",
        torch__utils__cpp_extension=extension,
    )  # fmt: skip
    assert refusal(tmp_path, PYTHONPATH=path) == (
        "fastvae: torch 2.9.1+cpu is too old: 2.10 is the oldest that will do."
    )


def test_setuptools_too_old(tmp_path: Path) -> None:
    """Older ones call the licence in pyproject.toml invalid, in a traceback."""
    path = put(tmp_path, setuptools="__version__ = '76.1.0'\ndef setup(**options): raise OSError")
    assert refusal(tmp_path, PYTHONPATH=path) == (
        "fastvae: setuptools 76.1.0 is too old: pip install 'setuptools>=77'."
    )


def metadata(tmp_path: Path, **env: str) -> Message:
    """Of the wheel that would be built."""
    done = setup_py("-q", "dist_info", "--output-dir", str(tmp_path), **env)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.dist-info/METADATA")
    return message_from_string(path.read_text())


def requirement(declared: Message) -> str:
    (torchs,) = (r for r in declared.get_all("Requires-Dist", []) if r.startswith("torch"))
    return torchs


def test_a_wheel_asks_for_the_torch_that_its_extension_was_built_against(tmp_path: Path) -> None:
    assert requirement(metadata(tmp_path)) == f"torch=={MINOR}.*"


def test_without_an_extension_any_supported_torch_will_do(tmp_path: Path) -> None:
    declared = metadata(tmp_path, FASTVAE_NO_EXTENSION="1")
    assert requirement(declared) == f"torch>={cpp.OLDEST_TORCH}"


def test_the_source_archive_has_what_its_tests_and_its_readme_need(tmp_path: Path) -> None:
    egg = ["egg_info", "--egg-base", str(tmp_path)]
    done = setup_py("-q", *egg, "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        stored = archive.extractfile(f"{archive.getnames()[0]}/PKG-INFO")
        assert stored is not None
        declared = message_from_string(stored.read().decode())
    assert requirement(declared) == f"torch>={cpp.OLDEST_TORCH}"

    folders = ("csrc", "tests", "benchmarks", "examples", "docs", "fastvae")
    wanted = {
        str(p.relative_to(ROOT))
        for folder in folders
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".cpp", ".h", ".cu", ".md", ".typed")
    }
    assert wanted and not wanted - names

    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text())
    assert links and not set(links) - names
    text = declared.get_payload()
    assert isinstance(text, str) and not re.findall(r"\]\((?!https?:)", text)
    assert all(link in text for link in links)


@pytest.mark.parametrize("version", ["2.9.1", "2.99.0+cpu"])
def test_with_another_torch_the_eager_backend_serves(version: str) -> None:
    """A torch below the range, and one that replaced that of the build."""
    code = (
        f"import torch; torch.__version__ = {version!r}\n"
        "import fastvae; b = fastvae.backends(); print(b['cpp'].detail)\n"
        "assert not b['cpp'].available and not b['triton'].available\n"
        "mu = torch.zeros(2, 3, requires_grad=True); z, kl = fastvae.rsample_kl(mu, mu)\n"
        "fastvae.ELBOLoss()(z, torch.rand(2, 3), kl=kl).backward(); assert mu.grad is not None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (detail,) = done.stdout.splitlines()
    assert version in detail
    (warned,) = (line for line in done.stderr.splitlines() if "Warning: " in line)
    assert warned.endswith(f"UserWarning: fastvae: {detail}; using the eager backend")


def test_a_device_that_cannot_start_does_not_end_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    devices_of = setup()["devices_of"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6 + 3 * index))
    assert devices_of(torch) == ["8.6", "8.9"]

    def too_old(index: int) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "get_device_capability", too_old)
    assert devices_of(torch) == []


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ([], ["8.0", "9.0", "10.0+PTX"]),
        (["7.5", "8.6", "9.0"], ["7.5", "8.0", "9.0", "10.0+PTX"]),
        (["12.0"], ["8.0", "9.0", "10.0", "12.0+PTX"]),
        (["7.0"], ["8.0", "9.0", "10.0+PTX"]),  # this nvcc knows no such thing any more
    ],
)
def test_a_build_is_for_the_devices_present_too(
    present: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 86 90 100 120\n")
    nvcc.chmod(0o755)
    architectures = setup()["architectures"]
    assert architectures(str(nvcc), present) == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0+PTX")
    assert architectures(str(nvcc), present) == ["8.6", "9.0+PTX"]
