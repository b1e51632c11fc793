"""What the kernels compile to, as a table: ``python -m bench.compiled --out bench/results``.

Needs no GPU: the launchers run on tensors in main memory while every launch is compiled for the
architecture instead of being run (``tests/reference/cubins.py``).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from fedcore_kernels.cuda import polar, products, spectra, stacks, weighted_mean, whitened
from fedcore_kernels.cuda.florg import sketched_rows
from tests.reference.cubins import ARCHITECTURES, Cubin, recorded

CLIENTS, MODULES, WIDTH = 20, 3, 4096

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "UTC", "DMMA")


@dataclass(frozen=True)
class Case:
    """One launcher on one shape; ``kernel`` picks its row among the kernels it launches."""

    kernel: str
    shape: str
    call: Callable[[], object]


def _stack(dtype: torch.dtype, rank: int, width: int = WIDTH) -> torch.Tensor:
    return torch.zeros(CLIENTS, MODULES, rank, width, dtype=dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sketched(rank: int) -> None:
    stack = _stack(torch.float32, rank)
    previous = torch.ones(MODULES, rank, WIDTH)
    root = torch.ones(CLIENTS, dtype=torch.float64)
    segments = stacks.segments_of(stack, rank)
    out = torch.empty_like(previous)
    sketched_rows(stack, CLIENTS, segments, root, previous, rank, 1e-12, out)


def cases() -> list[Case]:
    """The launches of the table."""
    root = torch.ones(CLIENTS, dtype=torch.float64)
    launches = []

    def add(kernel: str, shape: str, call: Callable[..., object], *arguments: object) -> None:
        launches.append(Case(kernel, shape, lambda: call(*arguments)))

    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
    for dtype, name in short.items():
        flat = torch.zeros(CLIENTS, 4 * WIDTH, dtype=dtype)
        add("weighted_mean_kernel", name, weighted_mean.weighted_mean, flat, root)
    for dtype, name in short.items():
        for rank in (8, 16, 64):
            stack, label = _stack(dtype, rank), f"{name}, r = {rank}"
            other = torch.zeros(MODULES, rank, WIDTH, dtype=_accumulator(dtype))
            cores = torch.zeros(MODULES, rank, CLIENTS, rank, dtype=torch.float64)
            add("cross_gram_kernel", label, stacks.cross_gram, stack, other)
            dot = dtype == torch.bfloat16 and rank > 16
            kernel = "apply_cores_dot_kernel" if dot else "apply_cores_kernel"
            add(kernel, label, stacks.apply_cores, stack, cores)
        add("gram_kernel", f"{name}, m = 160", stacks.gram, _stack(dtype, 8), root)
        pair = _stack(dtype, 8), _stack(dtype, 8)
        add("product_gram_kernel", f"{name}, r = 8", products.product_gram, *pair)
    for dtype, name, width in ((torch.bfloat16, "bf16", 2048), (torch.float32, "fp32", 1024)):
        stack, basis = _stack(dtype, 8, width), torch.zeros(MODULES, 8, width)
        label = f"{name}, r = 8, k = {width}"
        add("one_pass_kernel", label, whitened.whitened_sum, stack, root, basis)
    for rank in (8, 16, 32):
        add("whiten_kernel", f"r = {rank}", _sketched, rank)
        add("sketched_core_kernel", f"r = {rank}", _sketched, rank)
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        for order in (8, 16, 32, 64):
            square, label = torch.ones(64, order, order, dtype=dtype), f"{name}, n = {order}"
            add("eigh_kernel", label, spectra.eigh_small, square)
            add("svd_kernel", label, spectra.svd_small, square)
            add("polar_kernel", label, polar.polar, square, 1e-6, 0.0)
    return sorted(launches, key=lambda case: case.kernel)


def _cell(cubin: Cubin) -> str:
    spills = f" + {cubin.spilled_bytes} B spilled" if cubin.spilled_bytes else ""
    wide = sum(n for bits, n in cubin.loads.items() if bits >= 128)
    narrow = sum(n for bits, n in cubin.loads.items() if bits < 128)
    cores = next((name for name in TENSOR_CORES if cubin.count(name)), "–")
    return f"{cubin.registers}{spills} / {cubin.shared_bytes} / {wide}+{narrow} / {cores}"


def table() -> str:
    """One row per case, one column per architecture."""
    heads = " | ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    lines = [f"| kernel | shape | {heads} |", "|---" * (2 + len(ARCHITECTURES)) + "|"]
    for case in cases():
        cells = []
        for architecture in ARCHITECTURES:
            with recorded(architecture) as launches:
                case.call()
            cells.append(_cell(next(cubin for name, cubin in launches if name == case.kernel)))
        print(f"{case.kernel} {case.shape}: {cells}", file=sys.stderr)
        lines.append(f"| `{case.kernel}` | {case.shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compile, print and, with ``--out``, write ``compiled-kernels.md``."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the written table")
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module="triton")
    text = f"""# What the kernels compile to

triton {version("triton")}, torch {version("torch")}, {date.today()}; compiled, not run on a card.
`python -m bench.compiled --out bench/results`

Each cell: registers per thread (and spilled bytes) / bytes of shared memory per block / loads of 16
bytes + narrower ones in the code (scalars from tables are narrow) / tensor-core instruction.
{CLIENTS} clients, {MODULES} modules, width {WIDTH} unless stated otherwise.

{table()}
"""
    print(text)
    if chosen.out:
        (chosen.out / "compiled-kernels.md").write_text(text)


if __name__ == "__main__":
    main()
