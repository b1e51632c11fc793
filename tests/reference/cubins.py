"""Compile kernels for NVIDIA cards on a machine without one, and read the machine code.

Triton's compiler needs a driver only to learn its target. ``OfflineDriver`` answers the questions
asked while a kernel is compiled but not launched; the assembler and disassembler are those of the
triton wheel. Not for a process that runs kernels in the interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fedcore_kernels.cuda.configurations import for_architecture

ARCHITECTURES = (80, 90, 100)
"""A100, H100/H200, B200."""

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may ask for."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LOAD = re.compile(r"\bld\.global(?:\.(?!v\d)\w+(?:::\w+)?)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^\[]*\[[^\]]*\], *\[[^\]]*\], *(\w+)")
_OPCODE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)")


class OfflineDriver:
    """What ``JITFunction.warmup`` asks of the active driver."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        """The card to compile for."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        """A number of its own for every architecture, which keeps their caches apart."""
        return self.architecture

    def get_current_stream(self, device: int | None = None) -> int:
        """Nothing is launched."""
        return 0

    @staticmethod
    def is_active() -> bool:
        """Always."""
        return True

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Nothing is timed."""
        return lambda call, quantiles=None, **_: [0.0, 0.0, 0.0]


@dataclass(frozen=True)
class Cubin:
    """What one compiled kernel needs and does; ``spilled_bytes`` are those of a thread's stack."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ttir: str
    ptx: str
    binary: bytes

    @cached_property
    def opcodes(self) -> Counter[str]:
        """Instructions by name; disassembling takes as long as compiling."""
        matches = (_OPCODE.match(line) for line in _tool("nvdisasm", self.binary, "-c", "-ndf"))
        return Counter(match[1] for match in matches if match)

    def count(self, prefix: str) -> int:
        """Instructions whose name starts with ``prefix``."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefix))

    @property
    def loads(self) -> Counter[int]:
        """Loads from global memory, to registers or to shared memory, by their width in bits."""
        direct = ((count or "1", bits) for count, bits in _LOAD.findall(self.ptx))
        found = Counter(int(count) * int(bits) for count, bits in direct)
        return found + Counter(8 * int(size, 0) for size in _COPY.findall(self.ptx))

    @property
    def tensor_cores(self) -> bool:
        """Whether products run on tensor cores."""
        return any(self.count(name) for name in ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCMMA"))


def compile_for(
    architecture: int, kernel: Any, *arguments: Any, grid: tuple[int, ...] = (1,), **options: Any
) -> Cubin:
    """Compile ``kernel`` for ``arguments`` (tensors on the CPU stand for tensors on the card)."""
    driver.set_active(OfflineDriver(architecture))
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    return inspect(compiled)


def inspect(compiled: Any) -> Cubin:
    """Registers, spills, shared memory and code of a compiled kernel."""
    binary = compiled.asm["cubin"]
    usage = " ".join(_tool("cuobjdump", binary, "-res-usage"))
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None
    return Cubin(
        int(resources[1]),
        int(resources[2]),
        compiled.metadata.shared,
        compiled.asm["ttir"],
        compiled.asm["ptx"],
        binary,
    )


def _tool(name: str, binary: bytes, *options: str) -> list[str]:
    """The lines that a tool of the triton wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(_TOOLS / name), *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@contextmanager
def recorded(architecture: int) -> Iterator[list[tuple[str, Cubin]]]:
    """Compile for ``architecture``, instead of running them, all kernels launched inside the block.

    The launchers run as they are, with tensors on the CPU, so that what is compiled is what ships:
    their arguments, alignment and configuration. What they return is meaningless.
    """
    found: dict[int, tuple[str, Cubin]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        if id(compiled) not in found:
            found[id(compiled)] = self.fn.__name__, inspect(compiled)
        return compiled

    launches: list[tuple[str, Cubin]] = []
    driver.set_active(OfflineDriver(architecture))
    with pytest.MonkeyPatch.context() as patch, for_architecture(architecture):
        patch.setattr(JITFunction, "run", compile_only)
        yield launches
    launches += found.values()
