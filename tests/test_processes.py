"""After fastvae was used: DataLoader workers, forked and spawned processes, numbers of threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastvae

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
LARGE = 3000, 300  # shared between threads, and large enough for the memory that is reused


def use() -> Tensor:
    """Sampling and loss with gradients, on all threads."""
    mu = torch.zeros(LARGE).requires_grad_()
    z, kl = fastvae.rsample_kl(mu, mu)
    fastvae.elbo_loss(z, torch.zeros(LARGE), kl=kl, likelihood="gaussian").backward()
    assert mu.grad is not None and mu.grad.isfinite().all()
    return z.detach()


class Drawing(Dataset[Tensor]):
    """Draws in the worker: augmentation by a VAE, say."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        mu = torch.zeros(LARGE)
        return torch.cat([fastvae.rsample(mu, mu)[0, :6], torch.tensor([float(os.getpid())])])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_draw_apart(method: str) -> None:
    use()

    def epoch(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            Drawing(), batch_size=3, num_workers=2, multiprocessing_context=method,
            generator=generator, timeout=100,
        )  # fmt: skip
        return torch.cat(list(loader))

    first = epoch(1)
    assert len(first[:, -1].unique()) == 2
    assert len(first[:, :-1].unique(dim=0)) == 12
    if method == "fork":  # the second start of two interpreters proves nothing new
        assert torch.equal(epoch(1)[:, :-1], first[:, :-1])
        assert not torch.isclose(epoch(2)[:, :-1], first[:, :-1]).any()


def child(queue: Any, seed: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, neither ours nor torch's
    torch.manual_seed(seed)
    queue.put(use()[0, :6].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(method: str) -> None:
    use()
    torch.manual_seed(5)
    want = use()[0, :6].tolist()
    context = mp.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=child, args=(queue, seed)) for seed in (5, 6)]
    for process in processes:
        process.start()
    drawn = [queue.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    assert want in drawn and drawn[0] != drawn[1]
    use()  # the parent goes on


def test_set_num_threads_between_calls(one_and_two_threads: list[int]) -> None:
    results = []
    for threads in [*one_and_two_threads, 7, 1]:
        torch.set_num_threads(threads)
        torch.manual_seed(9)
        results.append(use())
    assert all(torch.equal(z, results[0]) for z in results)


def test_a_process_without_python_is_told(native: None, tmp_path: Path) -> None:
    """The Triton kernels are Python's. A C++ server that loads a compiled model has none: here,
    what a library calls when Python has ended."""
    from torch.utils import cpp_extension

    if (compiler := shutil.which(os.environ.get("CXX", "g++"))) is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path / "after_python.so"
    source = Path(__file__).with_name("after_python.cpp")
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    folder = Path(torch.__file__).parent / "lib"
    link = [f"-L{folder}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}"]
    flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, *include, source, "-o", library, *link], check=True)
    code = f"""
import ctypes
import torch
from fastvae import _C
_C.to_triton({{interpret}})
ctypes.pythonapi.Py_AtExit(ctypes.CDLL({str(library)!r}).call_operator)
"""

    def said(interpret: bool) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code.format(interpret=interpret)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said(interpret=False) == "it ran\n"
    assert said(interpret=True).startswith("fastvae: the kernels for cpu tensors are Python's")
