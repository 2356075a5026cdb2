"""The backends: the same functions each, chosen by argument or by device."""

from typing import cast

import torch

from fastvae._backends import cpp, cuda, eager, triton
from fastvae._backends._common import Backend, Ops, Prior, Terms

__all__ = ["Backend", "Ops", "Prior", "Terms", "backends", "check_backend", "select"]

_NAMES = ("auto", "cpp", "cuda", "triton", "eager")
_CPP, _CUDA = cast(Ops, cpp), cast(Ops, cuda)
_TRITON, _EAGER = cast(Ops, triton), cast(Ops, eager)


def backends() -> dict[str, Backend]:
    """Which backends can serve here, and for those that can't, why.

    Returns:
        ``{"cpp": Backend(available, detail), "cuda": …, "triton": …, "eager": …}``.
    """
    ops = {"cpp": _CPP, "cuda": _CUDA, "triton": _TRITON, "eager": _EAGER}
    return {name: backend.status() for name, backend in ops.items()}


def select(backend: str, device: torch.device) -> Ops:
    """The backend's functions for tensors on `device`.

    ``"auto"`` is cpp for CPU tensors, for CUDA tensors cuda, or triton where that is not built for
    the device, and eager for other devices or where the extension is not built.

    Raises:
        ValueError: an unknown name, or a backend that can't serve this device here.
    """
    check_backend(backend)
    if backend == "auto":
        if device.type == "cpu" and cpp.status().available:
            return _CPP
        if device.type == "cuda" and cuda.missing() is None and cuda.refusal(device) is None:
            return _CUDA
        if device.type == "cuda" and cpp.status().available:
            if (reason := triton.missing()) is not None:
                raise ValueError(
                    "CUDA tensors need an extension built with CUDA, or Triton, or "
                    f"backend='eager': {reason}"
                )
            return _TRITON
        return _EAGER
    if backend == "cpp":
        if not cpp.status().available:
            raise ValueError(f"backend 'cpp' is not available: {cpp.status().detail}")
        if device.type != "cpu":
            raise ValueError(f"backend 'cpp' serves CPU tensors, got a tensor on {device}")
        return _CPP
    if backend == "cuda":
        if (reason := cuda.missing()) is not None:
            raise ValueError(f"backend 'cuda' is not available: {reason}")
        if device.type != "cuda":
            raise ValueError(f"backend 'cuda' serves CUDA tensors, got a tensor on {device}")
        if (reason := cuda.refusal(device)) is not None:
            raise ValueError(f"backend 'cuda' is not available: {reason}")
        return _CUDA
    if backend == "triton":
        if (reason := triton.missing()) is not None:
            raise ValueError(f"backend 'triton' is not available: {reason}")
        if device.type != ("cpu" if triton.interprets() else "cuda"):
            which = (
                "CPU tensors under TRITON_INTERPRET=1"
                if triton.interprets()
                else ("CUDA tensors (CPU ones under TRITON_INTERPRET=1)")
            )
            raise ValueError(f"backend 'triton' serves {which}, got a tensor on {device}")
        return _TRITON
    return _EAGER


def check_backend(backend: str) -> None:
    """Raises unless backend is a known name, whether or not it can serve here."""
    if backend not in _NAMES:
        raise ValueError(f"backend must be one of {', '.join(_NAMES)}, got {backend!r}")
