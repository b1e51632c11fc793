"""Triton Grams and core products against their definitions, and their laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fedcore_kernels import apply_cores, backend, cross_gram, gram
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.cuda.stacks import segments_of
from fedcore_kernels.cuda.tasks import slab_tasks
from tests.property.stacks import KINDS, Round, make_round, rounds
from tests.reference.placement import placed
from tests.reference.tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [
    (1, 1, 1, 33),
    (3, 2, 3, 200),
    (2, 2, 7, 1000),
    (2, 1, 24, 200),
    (5, 2, 16, 256),
    (300, 1, 1, 33),
    (1, 1, 128, 40),
]


def shaped(shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str = "random") -> Round:
    return make_round(kind, *shape, seed=1, dtype=dtype)


def cores_for(stack: Tensor, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    clients, modules, rank, _ = stack.shape
    random = torch.Generator().manual_seed(2)
    return torch.randn(modules, rows, clients, rank, generator=random, dtype=dtype)


def as_multiplied(product: Tensor, dtype: torch.dtype, exact: tuple[torch.dtype, ...]) -> Tensor:
    """fp64 sums as right as the products they add: those of fp32 unless ``dtype`` is ``exact``."""
    assert product.dtype == torch.float64
    return product if dtype in exact else product.float()


def check_gram(case: Round, device: torch.device) -> None:
    with backend("reference"):
        expected = gram(case.stack, case.weights)
    with backend("triton"):
        found = gram(placed(case.stack, device), case.weights).cpu()
    assert torch.equal(found, found.mT)
    found = as_multiplied(found, case.stack.dtype, (torch.float32, torch.float64))
    assert_close(found, expected, case.stack.shape[3])


def check_cross_gram(stack: Tensor, reference: Tensor, device: torch.device) -> None:
    with backend("reference"):
        expected = cross_gram(stack, reference)
    with backend("triton"):
        found = cross_gram(placed(stack, device), placed(reference, device)).cpu()
    assert_close(as_multiplied(found, stack.dtype, (torch.float64,)), expected, stack.shape[3])


def check_apply_cores(cores: Tensor, stack: Tensor, device: torch.device) -> None:
    with backend("reference"):
        expected = apply_cores(cores, stack)
    with backend("triton"):
        found = apply_cores(placed(cores, device), placed(stack, device)).cpu()
    assert found.dtype == (torch.float64 if stack.dtype == torch.float64 else torch.float32)
    assert_close(found, expected, stack.shape[0] * stack.shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_and_shape(
    dtype: torch.dtype, shape: tuple[int, int, int, int], device: torch.device
) -> None:
    case = shaped(shape, dtype)
    check_gram(case, device)
    check_cross_gram(case.stack, case.previous, device)
    check_apply_cores(cores_for(case.stack, shape[2]), case.stack, device)


@given(rounds(max_clients=4, max_modules=2, max_rank=4, max_width=40, dtypes=DTYPES))
@settings(max_examples=25)
def test_rounds_of_every_kind(device: torch.device, case: Round) -> None:
    check_gram(case, device)
    check_cross_gram(case.stack, case.previous, device)
    check_apply_cores(cores_for(case.stack, 3), case.stack, device)


@pytest.mark.parametrize("rows", [1, 5, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_other_operand_has_any_number_of_rows_and_any_dtype(
    rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    stack = shaped((3, 2, 3, 70), dtype).stack
    for other in DTYPES:
        reference = shaped((1, 2, rows, 70), other).stack[0]
        check_cross_gram(stack, reference, device)
    check_apply_cores(cores_for(stack, rows, torch.float32), stack, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_need_not_be_contiguous_with_each_other(
    dtype: torch.dtype, device: torch.device
) -> None:
    whole = make_round("random", 4, 3, 6, 90, seed=5, dtype=dtype)
    bigger = whole.stack.transpose(0, 1).contiguous().transpose(0, 1)
    for stack in (bigger, whole.stack[1::2], bigger[:, 1:, ::2], whole.stack[..., 5:68]):
        modules, rank, width = stack.shape[1:]
        weights, previous = whole.weights[: len(stack)], whole.previous[:modules, :rank, -width:]
        check_gram(Round("strided", stack, weights, previous), device)
        check_cross_gram(stack, previous, device)
        check_apply_cores(cores_for(stack, 2).transpose(2, 3).contiguous().mT, stack, device)


def test_columns_beside_a_slice_are_not_seen(device: torch.device) -> None:
    whole = torch.full((3, 2, 5, 60), float("nan"))
    stack = whole[:, :, 1:4, 7:50]
    stack.copy_(make_round("random", 3, 2, 3, 43, seed=0).stack)
    check_gram(Round("strided", stack, torch.ones(3), stack[0]), device)
    check_cross_gram(stack, stack[0], device)
    check_apply_cores(cores_for(stack, 4), stack, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slabs_of_a_wide_factor_are_added_in_double_precision(
    dtype: torch.dtype, device: torch.device
) -> None:
    """The blocks' sums need 36 bits together, more than any of them alone."""
    values = torch.full((2048,), 2.0**-6, dtype=dtype)
    values[:128] = 2.0**9
    values[-1] = 3.0
    total = 128 * 2.0**18 + (2048 - 129) * 2.0**-12 + 9
    assert torch.tensor(total).float().item() != total
    stack = values.expand(2, 1, 2, 2048).contiguous()
    for bits in (16, 32, 64):
        size = configuration("cross_gram", device, bits, 16)
        _, slabs = slab_tasks(segments_of(stack, 2), 4, size["block_m"], size["block_k"], device)
        assert slabs >= 4
    with backend("triton"):
        crossed = cross_gram(placed(stack, device), placed(stack[0], device))
        dual = gram(placed(stack, device))
    assert (crossed == total).all()
    assert (dual == total).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [3, 24])
def test_a_core_of_one_client_and_row_picks_that_row(
    dtype: torch.dtype, rank: int, device: torch.device
) -> None:
    stack = shaped((3, 2, rank, 140), dtype).stack
    cores = torch.zeros(2, rank, 3, rank)
    cores[:, range(rank), 1, range(rank)] = 1
    with backend("triton"):
        found = apply_cores(placed(cores, device), placed(stack, device)).cpu()
    assert torch.equal(found, stack[1].to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_and_splitting_of_clients(dtype: torch.dtype, device: torch.device) -> None:
    case = shaped((5, 2, 3, 100), dtype)
    stack, order = case.stack, torch.tensor([3, 0, 4, 1, 2])
    cores = cores_for(stack, 3)
    rows = (order[:, None] * 3 + torch.arange(3)).flatten()
    with backend("triton"):
        dual = gram(placed(stack, device), case.weights)
        turned = gram(placed(stack[order], device), case.weights[order])
        assert_close(turned.float(), dual[:, rows][:, :, rows], 100)
        crossed = cross_gram(placed(stack, device), placed(case.previous, device))
        turned = cross_gram(placed(stack[order], device), placed(case.previous, device))
        assert_close(turned.float(), crossed[:, :, order], 100)
        applied = apply_cores(placed(cores, device), placed(stack, device))
        turned = apply_cores(placed(cores[:, :, order], device), placed(stack[order], device))
        assert_close(turned, applied, 15)
        halves = torch.cat([cores, cores[:, :, :1]], 2)
        halves[:, :, [0, -1]] /= 2
        split = torch.cat([stack, stack[:1]])
        assert_close(apply_cores(placed(halves, device), placed(split, device)), applied, 18)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal_to_the_bit(kind: str, device: torch.device) -> None:
    case = make_round(kind, 4, 2, 3, 300, seed=7, dtype=torch.float32)
    stack, previous = placed(case.stack, device), placed(case.previous, device)
    cores = placed(cores_for(case.stack, 3), device)
    with backend("triton"):
        assert torch.equal(gram(stack, case.weights), gram(stack, case.weights))
        assert torch.equal(cross_gram(stack, previous), cross_gram(stack, previous))
        assert torch.equal(apply_cores(cores, stack), apply_cores(cores, stack))
