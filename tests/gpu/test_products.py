"""Products of two factors, and rotations, against their dense definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedcore_kernels import (
    BackendError,
    align_and_average,
    backend,
    mean_pair_gram,
    product_gram,
    product_svd,
    soft_rotation,
)
from tests.reference.tolerance import assert_close, relative_error, tolerance

# Up to 64 stacked rows the Jacobi kernels decompose, beyond them torch does.
SHAPES = [(1, 1, 5, 9), (4, 3, 40, 33), (9, 8, 70, 130), (3, 5, 12, 64), (40, 2, 16, 48)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sides(
    clients: int, rank: int, p: int, q: int, dtype: torch.dtype, seed: int = 0, drift: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    left, right = (
        (normal(2, rank, size) + drift * normal(clients, 2, rank, size)).to(dtype)
        for size in (p, q)
    )
    weights = torch.rand(clients, generator=random) + 0.1
    return left, right, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("clients", "rank", "p", "q"), SHAPES)
def test_product_svd_is_the_truncated_dense_svd(
    clients: int, rank: int, p: int, q: int, dtype: torch.dtype, device: torch.device
) -> None:
    left, right, weights = sides(clients, rank, p, q, dtype)
    kept = min(3, clients * rank, p, q)
    with backend("triton"):
        found = product_svd(left.to(device), right.to(device), weights, kept)
    with backend("reference"):
        expected = product_svd(left, right, weights, kept)
    assert_close(found.values.cpu().float(), expected.values, max(p, q))
    assert torch.equal(found.rank.cpu(), expected.rank)
    product = (found.left.double().mT @ found.right.double()).cpu()
    # The subspace at the cut is as sure as its gap.
    gap = expected.gap.min().item()
    assert_close(product.float(), expected.left.mT @ expected.right, max(p, q), condition=1 / gap)
    allowed = tolerance(torch.float32, max(p, q)) * expected.values[:, 0]
    assert ((found.tail.cpu() - expected.tail).abs() <= allowed).all()
    rows = found.right.double().cpu()
    assert_close((rows @ rows.mT).float(), torch.eye(kept).expand(2, kept, kept), q)


def test_product_svd_of_nearly_equal_clients_keeps_their_differences(
    device: torch.device,
) -> None:
    left, right, weights = sides(6, 2, 40, 50, torch.float32, seed=1, drift=1e-4)
    with backend("triton"):
        found = product_svd(left.to(device), right.to(device), weights, 6)
    with backend("reference"):
        expected = product_svd(left, right, weights, 6)
    # Third to sixth direction stem from differences of size 1e-4.
    assert expected.values[:, 2].max() < 1e-3 * expected.values[:, 0].max()
    error = (found.values.cpu() - expected.values).abs()[:, :4] / expected.values[:, :4]
    assert error.max() < 1e-5


def test_product_svd_by_energy_of_zero_and_with_balanced_halves(device: torch.device) -> None:
    left, right, weights = sides(4, 3, 20, 30, torch.float32, seed=2)
    left[:, 1] = 0
    with backend("triton"):
        found = product_svd(
            left.to(device), right.to(device), weights, energy=0.8, split="balanced"
        )
    with backend("reference"):
        expected = product_svd(left, right, weights, energy=0.8, split="balanced")
    assert found.rank.tolist() == expected.rank.tolist()
    assert found.rank[1] == 0
    assert not found.left[1].any()
    assert_close(found.left.cpu(), expected.left.float(), 30, condition=100)
    assert_close(found.right.cpu(), expected.right.float(), 30, condition=100)


def test_product_svd_of_fp64_is_left_to_torch(device: torch.device) -> None:
    left, right, weights = sides(2, 2, 8, 9, torch.float64)
    with backend("triton"), pytest.raises(BackendError, match="fewer digits"):
        product_svd(left.to(device), right.to(device), weights, 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("clients", "rank", "p", "q"), SHAPES)
def test_inner_products_of_updates(
    clients: int, rank: int, p: int, q: int, dtype: torch.dtype, device: torch.device
) -> None:
    left, right, weights = sides(clients, rank, p, q, dtype, seed=3)
    there = left.to(device), right.to(device)
    with backend("triton"):
        gram, pairs = product_gram(*there), mean_pair_gram(*there, weights)
    with backend("reference"):
        assert_close(gram.cpu(), product_gram(left, right), p * q)
        assert_close(pairs.cpu(), mean_pair_gram(left, right, weights), p * q)
    assert torch.equal(gram, gram.mT)


def test_strided_sides(device: torch.device) -> None:
    left, right, weights = sides(5, 3, 24, 40, torch.float32, seed=4)
    wide = torch.zeros(5, 2, 4, 50, device=device)
    view = wide[:, :, 1:, 3:43].copy_(right)
    with backend("triton"):
        gram = product_gram(left.to(device), view)
        found = product_svd(left.to(device), view, weights, 2)
    with backend("reference"):
        assert_close(gram.cpu(), product_gram(left, right), 960)
        assert_close(found.values.cpu().float(), product_svd(left, right, weights, 2).values, 40)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_soft_rotation(strength: float, device: torch.device) -> None:
    random = torch.Generator().manual_seed(5)
    matrix = torch.randn(6, 2, 3, 3, generator=random, dtype=torch.float64)
    # A null direction to complete, a zero matrix, and a reflection.
    matrix[0, 0, :, 2] = 0
    matrix[1, 0] = 0
    matrix[2, 0] = torch.diag(torch.tensor([1.0, 2.0, -3.0]))
    with backend("triton"):
        found = soft_rotation(matrix.to(device), strength)
    with backend("torch"):
        expected = soft_rotation(matrix, strength)
    assert relative_error(found.rotation.cpu(), expected.rotation) < 1e-9
    assert torch.equal(found.rank.cpu(), expected.rank)
    assert torch.equal(found.singular.cpu(), expected.singular)


def test_align_and_average(device: torch.device) -> None:
    left, right, weights = sides(4, 3, 24, 40, torch.float32, seed=6, drift=0.3)
    references = [left[0].to(device), right[1].to(device)]
    with backend("triton"):
        found = align_and_average([left.to(device), right.to(device)], references, weights, 0.6)
    with backend("reference"):
        expected = align_and_average([left, right], [left[0], right[1]], weights, 0.6)
    for mine, theirs in zip(found.factors, expected.factors, strict=True):
        assert_close(mine.cpu(), theirs, 40, condition=100)
