"""Every configuration of the small-matrix kernels, compiled for cards that are not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedcore_kernels.cuda.polar import polar, procrustes
from fedcore_kernels.cuda.spectra import eigh_small, svd_small
from tests.reference.cubins import ARCHITECTURES, SHARED_LIMIT, Cubin, recorded

SIZES = (8, 16, 32, 64)

# Bytes a thread keeps aside for its addresses while the products of a 64 x 64 fp64 matrix fill all
# 255 registers; they are read once an attempt, some ten products apart. 16 warps spill twice that.
SPILLS: dict[tuple[int, str, int], int] = {}


def batch(n: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(40, n, n, dtype=dtype)


def rotations(n: int, dtype: torch.dtype) -> Tensor:
    """Sixteen blocks of columns, uploads of ``dtype``."""
    long = torch.zeros(40, n, 1024, dtype=dtype)
    return procrustes(long, long, rotation_only=True)


def compiled(architecture: int, launch: Callable[[], object]) -> dict[str, Cubin]:
    with recorded(architecture) as kernels:
        launch()
    return dict(kernels)


def check_resources(architecture: int, n: int, kernels: dict[str, Cubin]) -> None:
    for name, cubin in kernels.items():
        assert cubin.shared_bytes <= SHARED_LIMIT[architecture], name
        spilled = SPILLS.get((architecture, name, n), 0)
        assert cubin.spilled_bytes <= spilled, (name, cubin.spilled_bytes)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decompositions(architecture: int, dtype: torch.dtype, n: int) -> None:
    matrix = batch(n, dtype)
    kernels = compiled(architecture, lambda: (eigh_small(matrix), svd_small(matrix)))
    assert sorted(kernels) == ["eigh_kernel", "svd_kernel"]
    check_resources(architecture, n, kernels)
    for cubin in kernels.values():
        assert cubin.count("SHFL"), "partners come by shuffles"
        assert not cubin.count("DFMA") or dtype == torch.float64
        assert cubin.loads[8 * dtype.itemsize] + cubin.loads[128] > 0
    if n == 8:
        assert kernels["svd_kernel"].count("BAR") == 0, "one warp waits for nobody"


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_polar_factors_in_fp32(architecture: int, n: int) -> None:
    kernels = compiled(architecture, lambda: polar(batch(n, torch.float32), 1e-6, 0.0))
    assert sorted(kernels) == ["polar_jacobi_kernel", "polar_kernel"]
    check_resources(architecture, n, kernels)
    # Plain fp32 up to 16; beyond, three TF32 products for one.
    assert kernels["polar_kernel"].tensor_cores == (n > 16)
    assert not kernels["polar_kernel"].count("DFMA")


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rotations_in_fp64(architecture: int, n: int) -> None:
    kernels = compiled(architecture, lambda: rotations(n, torch.float32))
    assert sorted(kernels) == ["cross_product_kernel", "polar_jacobi_kernel", "polar_kernel"]
    check_resources(architecture, n, kernels)
    for name, cubin in kernels.items():
        assert cubin.count("DMMA"), name
        assert not cubin.count("HMMA"), name
    assert kernels["cross_product_kernel"].loads[128], "four columns a load"
