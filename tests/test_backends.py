"""Which backend serves which tensors, and what is said where none does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import require

import fastvae
from fastvae._backends import cpp, cuda, eager, select, triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def plain(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter, as users are, and with an extension built without CUDA."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda, "_REASON", "the extension was built without it")


@pytest.fixture
def no_triton(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "triton" else find(name, *args)

    monkeypatch.setattr(triton.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(triton, "_REASON", triton._look())


def reason(backend: str, device: torch.device) -> str:
    """What is raised; it has one line."""
    with pytest.raises(ValueError) as caught:
        select(backend, device)
    (line,) = str(caught.value).splitlines()
    return line


def test_each_device_has_its_backend(plain: None) -> None:
    require("cpp")
    assert select("auto", CPU) is select("cpp", CPU) is cpp
    assert select("auto", CUDA) is select("triton", CUDA) is triton
    assert select("auto", torch.device("meta")) is select("eager", CPU) is eager
    assert reason("cpp", CUDA) == "backend 'cpp' serves CPU tensors, got a tensor on cuda"


def test_cuda_tensors_go_to_cuda_where_it_is_built(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason("cuda", CUDA) == (
        "backend 'cuda' is not available: the extension was built without it"
    )
    assert fastvae.backends()["cuda"] == (False, "the extension was built without it")
    from fastvae import _C

    served = {0}
    monkeypatch.setattr(cuda, "_REASON", None)
    monkeypatch.setattr(_C, "cuda_serves", served.__contains__, raising=False)
    assert select("auto", CUDA) is select("cuda", CUDA) is cuda
    assert select("triton", CUDA) is triton
    assert select("auto", CPU) is cpp
    assert reason("cuda", CPU) == "backend 'cuda' serves CUDA tensors, got a tensor on cpu"
    assert fastvae.backends()["cuda"].detail.endswith("but no CUDA device")

    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": "8.0 9.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    other = torch.device("cuda", 1)
    assert select("auto", torch.device("cuda", 0)) is cuda and select("auto", other) is triton
    unfit = "its kernels were compiled for 8.0 9.0, and cuda:{} is 7.5"
    assert reason("cuda", other) == f"backend 'cuda' is not available: {unfit.format(1)}"
    assert fastvae.backends()["cuda"] == (True, "CUDA C++ for 8.0 9.0, CUDA tensors")
    current[0] = 1
    assert fastvae.backends()["cuda"] == (False, f"{unfit.format(1)} (its tensors use Triton)")


def test_a_build_without_cuda_says_so(native: None) -> None:
    from fastvae import _C

    assert (_C.build_info()["cuda"] is None) == (cuda._look() is not None)
    if torch.version.cuda is None:
        assert "takes a CUDA build of torch and nvcc" in str(cuda._look())


def test_compiled_code_is_not_sent_to_triton_past_cuda(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph has no thread that could ask for it."""
    monkeypatch.setattr(cuda, "_REASON", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="whose CUDA tensors go to backend 'cuda'"):
        triton.kl_divergence(torch.empty(2, 3, device="meta"), torch.empty(2, 3), None, None)


def test_triton_takes_cpu_tensors_only_in_the_interpreter(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = reason("triton", CPU)
    assert refused.startswith("backend 'triton' serves CUDA tensors")
    assert "TRITON_INTERPRET=1" in refused and refused.endswith("got a tensor on cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("triton", CPU) is triton
    assert select("auto", CPU) is cpp
    assert reason("triton", CUDA).endswith("got a tensor on cuda")
    state = fastvae.backends()["triton"]
    assert state.available and "interpreted" in state.detail


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_without_triton_the_error_says_how_to_get_it(device: torch.device, no_triton: None) -> None:
    refused = reason("triton", device)
    assert refused.startswith("backend 'triton' is not available: ")
    assert "pip install 'triton" in refused


def test_without_triton_cuda_tensors_are_not_served_by_something_slower(no_triton: None) -> None:
    refused = reason("auto", CUDA)
    assert "pip install 'triton" in refused and "backend='eager'" in refused
    assert select("eager", CUDA) is eager
    assert select("auto", CPU) is cpp
    state = fastvae.backends()["triton"]
    assert not state.available and "pip install 'triton" in state.detail


def test_an_older_triton_is_refused_and_leaves_cpu_tensors_alone(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(version: str) -> None:
        monkeypatch.setattr(triton, "_version", lambda: version)
        monkeypatch.setattr(triton, "_REASON", triton._look())

    installed("3.5.1")
    said = "Triton 3.5.1 is too old: pip install 'triton>=3.6'"
    assert reason("triton", CUDA) == f"backend 'triton' is not available: {said}"
    assert reason("auto", CUDA) == (
        f"CUDA tensors need an extension built with CUDA, or Triton, or backend='eager': {said}"
    )
    assert fastvae.backends()["triton"] == fastvae.Backend(False, said)
    assert select("auto", CPU) is cpp
    installed("3.10.0")  # as a number, not as text
    assert select("auto", CUDA) is triton


def test_without_the_extension_there_is_no_triton(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = fastvae.Backend(False, "the C++ extension is not built")
    monkeypatch.setattr(cpp, "_STATUS", absent)
    assert absent.detail in reason("triton", CUDA)
    assert not fastvae.backends()["triton"].available
    assert select("auto", CUDA) is eager


@pytest.mark.parametrize("on_cuda", [False, True])
def test_status_without_the_interpreter(
    on_cuda: bool, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    state = fastvae.backends()["triton"]
    assert state.available == on_cuda
    assert state.detail.startswith("Triton 3.") and "CUDA" in state.detail


def python(code: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_cpu_tensors_never_import_triton(native: None) -> None:
    code = (
        "import sys, torch, fastvae\n"
        "mu = torch.zeros(2, 3, requires_grad=True)\n"
        "z, kl = fastvae.rsample_kl(mu, mu)\n"
        "fastvae.elbo_loss(z, torch.rand(2, 3), kl=kl).backward()\n"
        "fastvae.backends()\n"
        "try: fastvae.rsample(mu, mu, backend='triton')\n"
        "except ValueError as e: print(e)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton' or '_triton.' in m\n"
        "             and m.startswith('fastvae')))\n"
    )
    refused, imported = python(code).splitlines()
    assert refused.startswith("backend 'triton' serves CUDA tensors")
    assert imported == "[]"


def test_every_operator_has_a_cuda_kernel(native: None) -> None:
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastvae::")]
    composites = {"fastvae::row_composite", "fastvae::rsample_composite"}  # of other operators
    assert len(schemas) == 15 and composites <= set(schemas)
    for name in set(schemas) - composites:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
