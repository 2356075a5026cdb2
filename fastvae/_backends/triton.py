"""The Triton backend: CUDA tensors through torch.ops.fastvae, whose kernels are fastvae/_triton.

Under TRITON_INTERPRET=1 it takes CPU tensors too: how the kernels are checked without a GPU.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastvae._backends import cpp, cuda
from fastvae._backends._common import Backend, minor

P = ParamSpec("P")
T = TypeVar("T")


def interprets() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_OLDEST = "3.6"


@functools.cache
def _version() -> str | None:
    """Of the Triton that is installed, which isn't imported for it; None where nothing says so."""
    for name in ("triton", "triton-rocm", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _look() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed here: pip install 'triton>={_OLDEST}'"
    if (version := _version()) is not None and minor(version) < minor(_OLDEST):
        return f"Triton {version} is too old: pip install 'triton>={_OLDEST}'"
    return None


_REASON = _look()  # once: torch.compile can't trace a look at the file system


def missing() -> str | None:
    """What keeps the kernels from running, whatever the device."""
    if not cpp.status().available:
        return "the operators are part of the C++ extension, and " + cpp.status().detail
    return _REASON


if missing() is None:
    cpp.direct.serve_cuda()


def status() -> Backend:
    if (reason := missing()) is not None:
        return Backend(False, reason)
    version = f"Triton {_version() or 'of unknown version'}"
    if interprets():
        return Backend(True, f"{version}, interpreted: slow, for CPU tensors, to check the kernels")
    if not torch.cuda.is_available():
        return Backend(False, f"{version} is here, but no CUDA device")
    return Backend(True, f"{version}, CUDA tensors")


def _serving(
    function: Callable[Concatenate[Tensor, P], T],
) -> Callable[Concatenate[Tensor, P], T]:
    """The function, with this thread's tensors sent to Triton: CPU tensors to its interpreter, and
    CUDA tensors to its kernels where they would go to those in CUDA C++."""

    @functools.wraps(function)
    def served(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if first.device.type != "cpu" and cuda.missing() is not None:
            return function(first, *args, **kwargs)
        if torch.compiler.is_compiling():
            what = (
                "the interpreter's CPU tensors in compiled code"
                if first.device.type == "cpu"
                else "compiled code here, whose CUDA tensors go to backend 'cuda'"
            )
            raise ValueError(f"backend 'triton' does not serve {what}: leave backend out")
        from fastvae import _C

        before = _C.to_triton(True)
        try:
            return function(first, *args, **kwargs)
        finally:
            _C.to_triton(before)

    return served


draw_seed = cpp.draw_seed
rsample = _serving(cpp.rsample)
rsample_kl = _serving(cpp.rsample_kl)
kl_divergence = _serving(cpp.kl_divergence)
log_likelihood = _serving(cpp.log_likelihood)
elbo = _serving(cpp.elbo)
count_nonfinite = cpp.count_nonfinite
