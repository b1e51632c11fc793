from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedcore_kernels import (
    KernelInputError,
    backend,
    block_grams,
    mean_pair_gram,
    product_gram,
    product_norm,
    rows,
)
from tests.processes import ONE_THREAD
from tests.property.pairs import Pair, make_pair, pairs
from tests.property.stacks import Round, rounds
from tests.reference.products import mean_product
from tests.reference.tolerance import assert_close, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(rounds(dtypes=DTYPES))
def test_blocks_are_the_products_of_two_clients(case: Round) -> None:
    found = block_grams(case.stack)
    clients, modules, rank, width = case.stack.shape
    assert found.shape == (modules, clients, clients, rank, rank)
    assert found.dtype == torch.float64
    wide = case.stack.double()
    for i in range(clients):
        for j in range(clients):
            assert_close(found[:, i, j], wide[i] @ wide[j].mT, width, condition=1e2)


@given(pairs(dtypes=DTYPES))
def test_product_gram_equals_that_of_the_dense_products(case: Pair) -> None:
    found = product_gram(case.left, case.right)
    with backend("reference"):
        expected = product_gram(case.left, case.right)
    assert found.dtype == torch.float64
    assert_close(found, expected, case.left.shape[3] + case.right.shape[3])
    scale = found.abs().amax((1, 2), keepdim=True)
    assert ((found - found.mT).abs() <= 1e-14 * scale).all()
    assert (torch.linalg.eigvalsh(found) >= -1e-13 * scale[:, 0]).all()


@given(pairs(dtypes=DTYPES))
def test_mean_pair_gram_is_the_mean_product_against_every_pair(case: Pair) -> None:
    arguments = case.left, case.right, case.weights
    found = mean_pair_gram(*arguments)
    with backend("reference"):
        expected = mean_pair_gram(*arguments)
    assert found.dtype == torch.float64
    assert_close(found, expected, case.left.shape[3] + case.right.shape[3], condition=10)


@given(pairs())
def test_what_the_numbers_are_for(case: Pair) -> None:
    """``||M||^2 = w^T K w``, ``<M, B A> = p^T H q`` and ``K w = diag(H)``."""
    left, right, shares = case.left, case.right, case.shares
    mean = mean_product(left, right, shares)
    products, pairs_with_mean = product_gram(left, right), mean_pair_gram(left, right, shares)
    energy = torch.einsum("i,lij,j->l", shares, products, shares)
    assert_close(energy, mean.square().sum((1, 2)), 100, condition=10)
    p, q = torch.linspace(-1, 2, len(shares)).double(), torch.linspace(3, -1, len(shares)).double()
    b, a = (torch.einsum("n,nlrk->lrk", c, s) for c, s in ((p, left), (q, right)))
    fitted = torch.einsum("lpq,lrp,lrq->l", mean, b, a)
    scale = mean.norm() * b.norm() * a.norm() + 1e-300
    found = torch.einsum("i,lij,j->l", p, pairs_with_mean, q)
    assert (found - fitted).abs().max() <= 1e-13 * scale
    diagonal = pairs_with_mean.diagonal(dim1=1, dim2=2)
    assert_close(products @ shares, diagonal, 100, condition=1e3)


def test_updates_are_compared_and_not_factors() -> None:
    case = make_pair("random", 6, 3, 4, (40, 30), seed=0, drift=3.0)
    scales = torch.tensor([4.0, 2, 1, 1, 2, 4])[:, None, None, None].double()
    turns = normal(1, 6, 3, 4, 4)
    left, right = scales * case.left, case.right
    expected = product_gram(left, right)
    found = product_gram(turns.mT @ left, torch.linalg.inv(turns) @ right)
    assert relative_error(found, expected) < 1e-12
    # S^r_ji in place of S^r_ij is the usual mistake; it is another number.
    swapped = (block_grams(left) * block_grams(right).mT).sum((3, 4))
    assert relative_error(swapped, expected) > 1e-2
    direct = (block_grams(left) * block_grams(right)).sum((3, 4))
    assert relative_error(direct, expected) < 1e-14


def test_equal_updates_in_different_gauges_are_at_distance_zero() -> None:
    case = make_pair("random", 1, 2, 4, (40, 30), seed=1)
    turn = normal(2, 2, 4, 4)
    left = torch.cat([case.left, turn.mT @ case.left])
    right = torch.cat([case.right, torch.linalg.inv(turn) @ case.right])
    k = product_gram(left, right)
    assert relative_error(k[:, 0, 0].sqrt(), product_norm(case.left[0], case.right[0])) < 1e-14
    distance = k[:, 0, 0] + k[:, 1, 1] - 2 * k[:, 0, 1]
    assert (distance.abs() < 1e-12 * k[:, 0, 0]).all()


@pytest.mark.parametrize("cache", [1, 20_000, 60_000])
def test_results_do_not_depend_on_the_size_of_a_copy_or_a_block(
    cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_pair("mixed_ranks", 7, 5, 3, (20, 31), seed=2)
    arguments = case.left, case.right
    expected = product_gram(*arguments), mean_pair_gram(*arguments, case.weights)
    monkeypatch.setattr(rows, "CACHE_BYTES", cache)
    assert_close(product_gram(*arguments), expected[0])
    assert_close(mean_pair_gram(*arguments, case.weights), expected[1])


def test_clients_without_weight_count_in_pairs_but_not_in_the_mean() -> None:
    case = make_pair("random", 3, 2, 2, (9, 8), seed=3)
    found = mean_pair_gram(case.left, case.right, [1, 0, 3])
    rest = mean_pair_gram(case.left[[0, 2]], case.right[[0, 2]], [1, 3])
    assert relative_error(found[:, [0, 2]][:, :, [0, 2]], rest) < 1e-14
    assert (found[:, 1].abs() > 1e-3).all()


MEMORY = """
import resource
import torch
from pathlib import Path
from fedcore_kernels import mean_pair_gram, product_gram

def peak():
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def both(clients, modules):
    factors = [torch.empty(clients, modules, 8, 64).normal_() for _ in range(2)]
    before = peak()
    product_gram(*factors)
    mean_pair_gram(*factors, torch.ones(clients))
    return peak() - before

both(2, 1)
print(both(256, 2))
"""


def test_memory_does_not_grow_with_the_square_of_the_stack() -> None:
    kernels = Path(__file__).parents[2] / "kernels"
    extra = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        # Freed blocks go back to the system, so that the peak is what was needed at once.
        env={
            "PYTHONPATH": str(kernels),
            **ONE_THREAD,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    ).stdout
    # Both Grams of one module take 64 MiB, the factors 2 MiB and a result 1 MiB.
    assert int(extra) < 32 << 20


PAIR = torch.ones(2, 3, 2, 8), torch.ones(2, 3, 2, 5)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: block_grams(PAIR[0][0]), r"stack has shape \(3, 2, 8\); pass \(N, L, r, k\)"),
    (lambda: product_gram(PAIR[0], PAIR[1][:1]), "right .*axis 0 must be 2, the clients of left"),
    (lambda: product_gram(PAIR[0], PAIR[1].int()), "right has dtype torch.int32"),
    (lambda: product_gram(*(t[..., :0] for t in PAIR)), r"left has shape .*: p is 0"),
    (lambda: mean_pair_gram(PAIR[0], PAIR[1][:, :, :1], [1, 1]), "right .*axis 2 must be 2, the r"),
    (lambda: mean_pair_gram(PAIR[0], PAIR[1].to("meta"), [1, 1]), "right is on meta and left on"),
    (lambda: mean_pair_gram(*PAIR, [0, 0]), "weights are all zero"),
    (lambda: mean_pair_gram(*PAIR, [1, float("nan")]), r"weights\[1\] is nan"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        call()
