"""Clients and modules more than 2^31 elements apart: offsets need 64 bits.

On the CPU the distance is a hole in a file, of which only the pages with data are ever read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedcore_kernels import apply_cores, backend, cross_gram, gram, nystrom_step, weighted_mean
from tests.property.stacks import make_round
from tests.reference.tolerance import assert_close

DISTANCE = 2**31 + 64


def far_apart(stack: Tensor, axis: int, device: torch.device, folder: Path) -> Tensor:
    """``stack`` with ``DISTANCE`` elements between the two entries of its leading ``axis``."""
    strides = list(stack.contiguous().stride())
    strides[axis] = DISTANCE
    size = DISTANCE + stack.numel()
    if device.type == "cuda":
        memory = torch.zeros(size, dtype=stack.dtype, device=device)
    else:
        memory = torch.from_file(str(folder / "memory"), True, size, dtype=stack.dtype)
    return memory.as_strided(stack.shape, strides).copy_(stack)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rank", [3, 24])
def test_factors(rank: int, axis: int, device: torch.device, tmp_path: Path) -> None:
    shape = (2, 1) if axis == 0 else (1, 2)
    case = make_round("random", *shape, rank, 40, seed=0, dtype=torch.bfloat16)
    cores = torch.randn(shape[1], rank, shape[0], rank)
    stack = far_apart(case.stack, axis, device, tmp_path)
    with backend("reference"):
        dual = gram(case.stack, case.weights)
        crossed = cross_gram(case.stack, case.previous)
        applied = apply_cores(cores, case.stack)
    with backend("triton"):
        assert_close(gram(stack, case.weights).cpu().float(), dual, 40)
        found = cross_gram(stack, case.previous.to(device)).cpu().float()
        assert_close(found, crossed, 40)
        assert_close(apply_cores(cores.to(device), stack).cpu(), applied, 2 * rank)


def test_rows_of_a_mean(device: torch.device, tmp_path: Path) -> None:
    case = make_round("random", 2, 1, 3, 50, seed=0, dtype=torch.bfloat16)
    updates = far_apart(case.stack.flatten(1), 0, device, tmp_path)
    with backend("reference"):
        expected = weighted_mean(case.stack.flatten(1), case.weights)
    with backend("triton"):
        assert_close(weighted_mean(updates, case.weights).cpu(), expected, 2)


def test_a_whole_step(device: torch.device, tmp_path: Path) -> None:
    case = make_round("random", 2, 1, 2, 50, seed=0, dtype=torch.bfloat16)
    stack = far_apart(case.stack, 0, device, tmp_path)
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, case.previous)
    with backend("triton"):
        found = nystrom_step(stack, case.weights, case.previous.to(device))
    assert_close(found.factor.cpu(), expected.factor, 50, condition=expected.condition.item())
