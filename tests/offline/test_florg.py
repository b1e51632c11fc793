"""What the fused middle of the sketched step compiles to."""

from __future__ import annotations

import pytest
import torch

from fedcore_kernels.cuda import florg
from tests.reference.cubins import ARCHITECTURES, SHARED_LIMIT, recorded

CLIENTS, RANK = 5, 8

# One address, read twice: the assembler prefers its stack to a 129th register, which costs a warp.
SPILLS = {(100, 8): 8}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [8, florg.FUSED_LIMIT])
def test_middle_fits_into_the_registers_of_one_program(architecture: int, rows: int) -> None:
    partials = torch.zeros(4, 2, CLIENTS * RANK, rows, dtype=torch.float64)
    root, mixing = torch.ones(CLIENTS).double(), torch.zeros(2, rows, rows).double()
    with recorded(architecture) as launches:
        florg._fused_middle(partials, RANK, root, mixing, 1e-6, 1e-12)
    ((_, cubin),) = launches
    assert cubin.spilled_bytes <= SPILLS.get((architecture, rows), 0)
    assert cubin.shared_bytes <= SHARED_LIMIT[architecture]
    assert cubin.count("DMMA") > 0
    assert cubin.count("HMMA") == cubin.count("HGMMA") == cubin.count("UTC") == 0
