"""Compiles launches ahead of time, for a GPU that need not be here, and reads the artefact.

Not for TRITON_INTERPRET=1, under which there is nothing to compile.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastvae._triton.launch import THREADS, launches_to, options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # LDG.E.128, v_fma_f32
    jump: int | None  # where a branch goes

    @property
    def backward(self) -> bool:
        return self.jump is not None and self.jump < self.address


@dataclass(frozen=True)
class Artefact:
    """One compiled launch."""

    kernel: str
    variant: str  # the same for launches that one compilation serves
    arch: str
    constexprs: dict[str, Any]
    registers: int
    spilled_bytes: int  # of memory that the compiler took for lack of registers
    instructions: list[Instruction]
    doubles: list[float]  # the float64 constants in Triton's intermediate code
    seconds: float  # to compile

    @property
    def loop(self) -> list[Instruction]:
        """The body of the loop over tiles. Of a kernel that has one tile: all of it."""
        jumps = [i for i in self.instructions if i.backward]
        if not jumps or not self.over_tiles:
            return self.instructions
        last = max(jumps, key=lambda i: i.address - (i.jump or 0))
        return [i for i in self.instructions if (last.jump or 0) <= i.address <= last.address]

    @property
    def over_tiles(self) -> bool:
        # One's loop is over the draws, the other's over the KL alone.
        return self.kernel not in ("sample_backward_kernel", "sample_stream_kernel")

    @property
    def elements(self) -> int:
        """Per thread and tile."""
        c = self.constexprs
        tile: int = c["BLOCK"] if "BLOCK" in c else 4 * c["T"] if "T" in c else c["R"] * c["C"]
        return max(tile // THREADS, 1)

    def accesses(self, instructions: list[Instruction]) -> Counter[tuple[str, int]]:
        """How many global ("load" or "store", bytes per thread) there are."""
        found = (access(i.name) for i in instructions)
        return Counter(a for a in found if a is not None)

    def issued(self, instructions: list[Instruction]) -> float:
        """Issue slots per thread."""
        return sum(slots(i.name) for i in instructions)


def slots(name: str) -> float:
    """How many issue slots an instruction takes."""
    if name == "NOP" or name.startswith("s_"):  # a wave's scalar instructions have their own
        return 0.0
    # NVIDIA has half as many units for float64 as for float32.
    return 2.0 if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)", name) else 1.0


_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}
_AMD_WIDTHS |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_NVIDIA_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def access(name: str) -> tuple[str, int] | None:
    """("load" or "store", bytes) of an instruction that reaches global memory."""
    if match := re.match(r"(?:buffer|global|flat)_(load|store)_([a-z0-9]+)", name):
        return match[1], _AMD_WIDTHS[match[2]]
    if match := re.match(r"(LDG|STG)\.(.*)", name):
        widths = [_NVIDIA_WIDTHS[w] for w in match[2].split(".") if w in _NVIDIA_WIDTHS]
        return "load" if match[1] == "LDG" else "store", widths[0] if widths else 4
    return None


def compile_launches(arch: str, run: Callable[[], None]) -> list[Artefact]:
    """What `run` launches, compiled for `arch`; nothing is executed, tensors may be anywhere."""
    target, artefacts = TARGETS[arch], []

    class Driver:
        """A device of that kind, as far as compiling needs one."""

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> int:
            return 1000 + list(TARGETS).index(arch)  # Triton keeps its compiled kernels by device

        def get_current_stream(self, device: int) -> int:
            return 0

    def build(kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
        start = time.perf_counter()
        compiled = kernel.warmup(*args, grid=(programs,), **constexprs, **options(target.warp_size))
        seconds = time.perf_counter() - start
        read = read_nvidia if target.backend == "cuda" else read_amd
        doubles = parse_doubles(compiled.asm["ttir"])
        name, variant = kernel.__name__, compiled.hash
        artefacts.append(
            Artefact(name, variant, arch, constexprs, *read(compiled), doubles, seconds)
        )

    driver.set_active(Driver())  # for the rest of the process: this is a tool's, not a user's
    with launches_to(build):
        run()
    return artefacts


def parse_doubles(ttir: str) -> list[float]:
    """Scalars, and what tensors are filled with; infinities and NaN are written as their bits."""

    def number(text: str) -> float:
        bits = text.startswith("0x")
        return struct.unpack(">d", bytes.fromhex(text[2:]))[0] if bits else float(text)

    found = re.findall(r"arith\.constant (?:dense<)?([^\s>]+)>? : (?:tensor<[\dx]+x)?f64\b", ttir)
    return [number(text) for text in found]


def read_nvidia(compiled: Any) -> tuple[int, int, list[Instruction]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"], parse_sass(sass)


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True)
    return done.stdout


def parse_sass(text: str) -> list[Instruction]:
    found = []
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
    for address, name, operands in line.findall(text):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        at, jump = int(address, 16), int(target[1], 16) if target else None
        if jump == at:  # the trap behind the last instruction
            break
        found.append(Instruction(at, name, jump))
    return found


def read_amd(compiled: Any) -> tuple[int, int, list[Instruction]]:
    text = compiled.asm["amdgcn"]
    used = {
        k: int(v)
        for k, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return used["vgpr_count"], used["private_segment_fixed_size"], parse_amd(text)


def parse_amd(text: str) -> list[Instruction]:
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.split("s_endpgm")[0].splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            labels[match[1]] = len(found)
        elif match := re.match(r"\t((?:v|s|ds|buffer|global|flat)_\w+)(.*)", line):
            found.append((match[1], match[2]))
    return [
        Instruction(at, name, labels.get(operands.strip()) if "branch" in name else None)
        for at, (name, operands) in enumerate(found)
    ]
