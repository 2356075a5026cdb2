"""Runs Triton's kernels on CPU tensors by what Triton makes of them: their PTX (sm_90), translated
as nvcc's is. Memory is what the storages of a launch's own arguments hold. A plugin of pytest:

    TRITON_INTERPRET=0 PYTHONPATH=tests/ptx EMULATOR_FOLDER=FOLDER \\
        python -m pytest -p triton_launcher tests/test_elbo.py -k triton

leaves the translated kernels in FOLDER, and in PROCESS.json how often which was launched.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from translate import translate
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import build
import fastvae._backends.triton as backend
from fastvae._triton.launch import launches_to, options

FOLDER = Path(os.environ["EMULATOR_FOLDER"])
TARGET = GPUTarget("cuda", 90, 32)
NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}

launched: Counter[str] = Counter()


class Device:
    """As far as compiling needs one."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def once(name: str, make: Callable[[Path], object]) -> Path:
    """FOLDER/name; another process may be making it too."""
    path = FOLDER / name
    if not path.exists():
        mine = FOLDER / f"{os.getpid()}-{name}"
        make(mine)
        mine.rename(path)
    return path


@functools.cache
def emulator() -> ctypes.CDLL:
    """Loaded behind the C library, whose allocations it does not see here."""
    once("device.h.gch", build.header)
    return ctypes.CDLL(str(once("libcudart.so", build.runtime)), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def load(kernel: str, ptx: str, shared: int) -> bytes:
    """The kernel's name, which says which of its variants it is."""
    name = f"{kernel}_{hashlib.sha256(f'{shared} {ptx}'.encode()).hexdigest()[:12]}"
    source = translate(ptx.replace(kernel, name), shared)
    ctypes.CDLL(str(once(f"{name}.so", lambda to: build.library(source, to))))
    return name.encode()


def flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of each parameter of the compiled kernel."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def launch(kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
    """As `launches_to` wants it."""
    compiled = kernel.warmup(*args, grid=(programs,), **constexprs, **options(TARGET.warp_size))
    run = emulator()
    name = load(kernel.__name__, compiled.asm["ptx"], compiled.metadata.shared)
    parameters, storages = [], {}
    for kind, value in flat(list(compiled.src.signature.values())[: len(args)], args):
        if kind.startswith("*"):
            parameters.append(ctypes.c_uint64(value.data_ptr()))
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        else:
            parameters.append(NUMBERS[kind](value))
    parameters += [ctypes.c_uint64(0)] * 2  # memory that Triton would add, if it were asked for
    pointers = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
    for start, size in storages.items():
        run.emulator_add(ctypes.c_void_p(start), ctypes.c_size_t(size))
    threads = compiled.metadata.num_warps * TARGET.warp_size
    run.emulator_launch(name, pointers, programs, threads)
    for start in storages:
        run.emulator_remove(ctypes.c_void_p(start))
    launched[described(kernel.__name__, constexprs)] += 1


def described(name: str, constexprs: dict[str, Any]) -> str:
    """With formula and compute type; if it has gradients, or uses a counter's four normals."""
    formula, needs = constexprs.get("FORMULA"), constexprs.get("NEEDS")
    words = [name, getattr(formula, "__name__", None), constexprs.get("COMPUTE")]
    words.append("gradients" if (any(needs) if isinstance(needs, tuple) else needs) else None)
    words.append("four" if constexprs.get("FOUR") else None)
    return " ".join(str(word) for word in words if word is not None)


driver.set_active(Device())


def pytest_configure() -> None:
    backend.interprets = lambda: True  # CPU tensors are served


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    with launches_to(launch):
        return (yield)


def pytest_sessionfinish() -> None:
    (FOLDER / f"{os.getpid()}.json").write_text(json.dumps(launched))
