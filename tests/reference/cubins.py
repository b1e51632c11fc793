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
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fedcore_kernels.cuda.configurations import for_architecture

ARCHITECTURES = (80, 90, 100)
"""A100, H100/H200, B200."""

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may ask for."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


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
    """What one compiled kernel needs and does."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    opcodes: Counter[str]
    ttir: str

    def count(self, prefix: str) -> int:
        """Instructions whose name starts with ``prefix``."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefix))

    @property
    def loads(self) -> Counter[int]:
        """Loads from global memory by their width in bits."""
        found: Counter[int] = Counter()
        for name, n in self.opcodes.items():
            if name.startswith(("LDG.", "LDGSTS.")):
                width = re.search(r"\.(64|128|256|U16|U8)(\.|$)", name)
                found[{"U16": 16, "U8": 8}.get(width[1]) or int(width[1]) if width else 32] += n
        return found

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
    return inspect(compiled, architecture)


def inspect(compiled: Any, architecture: int) -> Cubin:
    """Registers, spills, shared memory and instructions of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target\s+(sm_\w+)", compiled.asm["ptx"])
        assert target is not None
        sass = _run(str(_TOOLS / "nvdisasm"), "-c", str(cubin)).stdout
        report = _run(
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name={target[1]}",
            str(ptx),
            "-o",
            str(Path(folder, "again")),
        ).stderr
    spills, registers = _SPILLS.search(report), re.search(r"Used (\d+) registers", report)
    assert spills is not None
    assert registers is not None
    matches = (_OPCODE.match(line) for line in sass.splitlines())
    return Cubin(
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        compiled.metadata.shared,
        Counter(match[1] for match in matches if match),
        compiled.asm["ttir"],
    )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


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
            found[id(compiled)] = self.fn.__name__, inspect(compiled, architecture)
        return compiled

    launches: list[tuple[str, Cubin]] = []
    driver.set_active(OfflineDriver(architecture))
    with pytest.MonkeyPatch.context() as patch, for_architecture(architecture):
        patch.setattr(JITFunction, "run", compile_only)
        yield launches
    launches += found.values()
