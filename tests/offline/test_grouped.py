"""What the grouped kernels compile to, for every entry of every architecture's configurations.

The launchers run as they ship; only the launch itself is replaced by a compilation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources

import pytest
import torch
from torch import Tensor

from fedcore_kernels.cuda import stacks, weighted_mean
from tests.reference.cubins import ARCHITECTURES, SHARED_LIMIT, Cubin, recorded
from tests.reference.offsets import narrow_products

MODULES, WIDTH = 2, 4096

DTYPES = {"16": torch.bfloat16, "32": torch.float32, "64": torch.float64}

# On sm_80 all products are warp-wide; later cards have an instruction for larger tiles.
TENSOR_CORES = {80: ("HMMA",), 90: ("HMMA", "HGMMA"), 100: ("HMMA", "UTCHMMA")}

# Loads of entries of the task and segment tables and of the clients' weights.
SCALARS = 16


def stack_of(dtype: torch.dtype, clients: int, rank: int, width: int = WIDTH) -> Tensor:
    return torch.zeros(clients, MODULES, rank, width, dtype=dtype)


def mean(dtype: torch.dtype, _: int, width: int = WIDTH) -> None:
    shares = torch.full((5,), 0.2, dtype=torch.float64)
    weighted_mean.weighted_mean(torch.zeros(5, width, dtype=dtype), shares)


def gram(dtype: torch.dtype, rows: int, width: int = WIDTH) -> None:
    stacks.gram(stack_of(dtype, 4, rows // 4, width), torch.ones(4, dtype=torch.float64))


def cross_gram(dtype: torch.dtype, rows: int, width: int = WIDTH) -> None:
    basis = torch.float64 if dtype == torch.float64 else torch.float32
    stacks.cross_gram(stack_of(dtype, 5, 8, width), torch.zeros(MODULES, rows, width, dtype=basis))


def apply_cores(dtype: torch.dtype, rows: int, width: int = WIDTH) -> None:
    rank = min(rows, 16)
    stacks.apply_cores(stack_of(dtype, 5, rank, width), torch.zeros(MODULES, rows, 5, rank))


def apply_cores_dot(dtype: torch.dtype, rows: int, width: int = WIDTH) -> None:
    stacks.apply_cores(stack_of(dtype, 5, 32, width), torch.zeros(MODULES, rows, 5, 32))


LAUNCHERS: dict[str, Callable[..., None]] = {
    "weighted_mean": mean,
    "gram": gram,
    "cross_gram": cross_gram,
    "apply_cores": apply_cores,
    "apply_cores_dot": apply_cores_dot,
}

ROWS = {"weighted_mean": 0, "gram": 32, "cross_gram": 32, "apply_cores": 8, "apply_cores_dot": 32}


def entries() -> Iterator[tuple[int, str, torch.dtype, int]]:
    """(architecture, kernel, dtype, rows) of every entry, and one in fp16 for each kernel."""
    for architecture in ARCHITECTURES:
        file = f"configurations/sm_{architecture}.json"
        table = json.loads((resources.files("fedcore_kernels.cuda") / file).read_text())
        for kernel in LAUNCHERS:
            for bits, level in table[kernel].items():
                sizes = [0] if kernel == "weighted_mean" else [int(rows) for rows in level]
                for rows in sizes:
                    yield architecture, kernel, DTYPES[bits], rows
            if kernel != "apply_cores_dot":
                yield architecture, kernel, torch.float16, sizes[-1]


ENTRIES = list(entries())

# The largest tiles of every architecture, kernel and dtype.
LARGEST = list({entry[:3]: entry for entry in ENTRIES}.values())


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


@cache
def compiled(
    architecture: int, kernel: str, dtype: torch.dtype, rows: int, width: int = WIDTH
) -> Cubin:
    with recorded(architecture) as launches:
        LAUNCHERS[kernel](dtype, rows, width)
    ((launched, cubin),) = launches
    assert launched == f"{kernel}_kernel"
    return cubin


def check_loads(cubin: Cubin, kernel: str, dtype: torch.dtype) -> None:
    """Uploads come in 16 bytes a thread, or 8 where they have 16 bits.

    Whatever is narrower is an entry of a table or a weight, of which there are at most ``SCALARS``.
    The mean and the SIMT sum also read a weight or a core for each row of the uploads: at most one
    narrow load more for each wide one.
    """
    least = 64 if dtype.itemsize == 2 else 128
    wide = sum(n for bits, n in cubin.loads.items() if bits >= least)
    narrow = sum(n for bits, n in cubin.loads.items() if bits < least)
    paired = wide if kernel in ("weighted_mean", "apply_cores") else 0
    assert wide > 0
    assert narrow <= SCALARS + paired, cubin.loads


def in_doubles(kernel: str, dtype: torch.dtype) -> bool:
    return dtype == torch.float64 or (kernel == "gram" and dtype == torch.float32)


def check_precision(cubin: Cubin, kernel: str, dtype: torch.dtype) -> None:
    """Products of fp64, of 16-bit numbers as they are, or of fp32 in three TF32 parts."""
    dots = [line for line in cubin.ttir.splitlines() if "tt.dot" in line]
    if kernel in ("weighted_mean", "apply_cores"):
        assert not dots
        return
    if in_doubles(kernel, dtype):
        wanted = "xf64> * tensor"
    elif dtype == torch.bfloat16:
        wanted = "xbf16> * tensor"
        # The fp32 operand comes in three parts.
        assert len(dots) % 3 == 0 or kernel == "gram"
    else:
        wanted = "xf16> * tensor" if kernel == "gram" else "inputPrecision = tf32x3"
    assert dots
    assert all(wanted in line for line in dots)


@pytest.mark.parametrize(("architecture", "kernel", "dtype", "rows"), ENTRIES, ids=name)
def test_entry(architecture: int, kernel: str, dtype: torch.dtype, rows: int) -> None:
    cubin = compiled(architecture, kernel, dtype, rows)
    assert cubin.spilled_bytes == 0
    assert cubin.shared_bytes <= SHARED_LIMIT[architecture]
    check_loads(cubin, kernel, dtype)
    check_precision(cubin, kernel, dtype)
    assert narrow_products(cubin.ttir) == []
    if kernel == "apply_cores":
        # Nothing passes through shared memory on the way of a row.
        assert cubin.shared_bytes == 0
        assert "bar.sync" not in cubin.ptx


@pytest.mark.parametrize(("architecture", "kernel", "dtype", "rows"), LARGEST, ids=name)
def test_instructions(architecture: int, kernel: str, dtype: torch.dtype, rows: int) -> None:
    cubin = compiled(architecture, kernel, dtype, rows)
    doubles = cubin.count("DMMA")
    others = sum(cubin.count(name) for name in TENSOR_CORES[architecture])
    products = kernel not in ("weighted_mean", "apply_cores")
    assert (doubles > 0) == (products and in_doubles(kernel, dtype))
    assert (others > 0) == (products and not in_doubles(kernel, dtype))
    # Sums have one order: nothing is added in memory.
    assert cubin.count("ATOMG") == cubin.count("RED.") == 0
    assert cubin.count("LDL") == cubin.count("STL") == 0


@pytest.mark.parametrize("kernel", list(LAUNCHERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_are_multiples_of_eight_are_loaded_wide(
    kernel: str, dtype: torch.dtype
) -> None:
    if kernel == "apply_cores_dot":
        dtype = torch.bfloat16
    check_loads(compiled(90, kernel, dtype, ROWS[kernel], width=1000), kernel, dtype)


@pytest.mark.parametrize("kernel", list(LAUNCHERS))
def test_odd_widths_compile_and_load_element_by_element(kernel: str) -> None:
    cubin = compiled(90, kernel, torch.bfloat16, ROWS[kernel], width=999)
    assert cubin.shared_bytes <= SHARED_LIMIT[90]
    assert cubin.loads[16] > 0
    assert narrow_products(cubin.ttir) == []


def test_a_product_of_32_bits_in_an_address_is_seen() -> None:
    import triton
    import triton.language as tl

    from tests.reference.cubins import compile_for

    @triton.jit
    def overflowing(x, stride, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
        row = tl.program_id(0) * stride + tl.arange(0, BLOCK)
        tl.store(x + row, tl.load(x + row.to(tl.int64)) + 1)

    found = narrow_products(compile_for(90, overflowing, torch.zeros(64), 32, BLOCK=32).ttir)
    assert len(found) == 2
