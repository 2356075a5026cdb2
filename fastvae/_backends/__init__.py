"""The backends: the same functions each, chosen by argument or by device."""

from typing import cast

import torch

from fastvae._backends import cpp, eager
from fastvae._backends._common import Backend, Ops, Prior, Terms

__all__ = ["Backend", "Ops", "Prior", "Terms", "backends", "check_backend", "select"]

_NAMES = ("auto", "cpp", "triton", "eager")
_TRITON = Backend(False, "the Triton kernels are not part of this version; CUDA tensors use eager")
_CPP, _EAGER = cast(Ops, cpp), cast(Ops, eager)


def backends() -> dict[str, Backend]:
    """Which backends can serve here, and for those that can't, why.

    Returns:
        ``{"cpp": Backend(available, detail), "triton": …, "eager": …}``.
    """
    return {"cpp": _CPP.status(), "triton": _TRITON, "eager": _EAGER.status()}


def select(backend: str, device: torch.device) -> Ops:
    """The backend's functions for tensors on `device`.

    ``"auto"`` is cpp for CPU tensors where the extension is built, and eager otherwise.

    Raises:
        ValueError: an unknown name, or a backend that can't serve this device here.
    """
    if backend == "auto":
        return _CPP if device.type == "cpu" and cpp.status().available else _EAGER
    if backend == "eager":
        return _EAGER
    if backend == "cpp":
        if not cpp.status().available:
            raise ValueError(f"backend 'cpp' is not available: {cpp.status().detail}")
        if device.type != "cpu":
            raise ValueError(f"backend 'cpp' serves CPU tensors, got a tensor on {device}")
        return _CPP
    if backend == "triton":
        raise ValueError(f"backend 'triton' is not available: {_TRITON.detail}")
    check_backend(backend)
    raise AssertionError(f"no branch for backend {backend!r}")


def check_backend(backend: str) -> None:
    """Raises unless backend is a known name, whether or not it can serve here."""
    if backend not in _NAMES:
        raise ValueError(f"backend must be one of {', '.join(_NAMES)}, got {backend!r}")
