"""Polar factors by products alone, and the quintics they are made of."""

from __future__ import annotations

from math import log10

import pytest
import torch
from torch import Tensor

from fedcore_kernels import isometries as module
from fedcore_kernels import polar, procrustes
from fedcore_kernels.isometries import FEWEST, isometries
from fedcore_kernels.quintics import quintics, value
from tests.reference.dense import polar as definition
from tests.reference.tolerance import relative_error


def conditioned(count: int, p: int, q: int, kappa: float) -> tuple[Tensor, Tensor]:
    """Matrices of condition ``kappa`` and their polar factors."""
    random = torch.Generator().manual_seed(p * 100 + q)

    def basis(size: int) -> Tensor:
        normal = torch.randn(count, size, q, generator=random, dtype=torch.float64)
        return torch.linalg.qr(normal).Q

    left, right = basis(p), basis(q)
    values = torch.logspace(0, -log10(kappa), q, dtype=torch.float64)
    return left * values @ right.mT, left @ right.mT


@pytest.mark.parametrize("lower", [0.5, 1e-1, 1e-2, 1e-3])
def test_quintics_carry_the_interval_to_one_and_nothing_from_far_below(lower: float) -> None:
    x = torch.logspace(log10(lower), 0, 2001, dtype=torch.float64)
    below = torch.logspace(-8, log10(lower / 4), 500, dtype=torch.float64)
    for quintic in quintics(lower, 1e-13):
        x, below = value(quintic, x), value(quintic, below)
    assert (x - 1).abs().max() < 1e-12
    assert ((below - 1).abs() > 1e-3).all()
    assert below.max() < 1.1


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 2), (8, 8), (16, 16), (9, 4), (40, 33)])
@pytest.mark.parametrize("kappa", [1.0, 30.0, 1e3])
def test_well_conditioned_matrices_settle_at_their_polar_factor(
    p: int, q: int, kappa: float
) -> None:
    matrix, expected = conditioned(20, p, q, kappa)
    factor, settled = isometries(1e-3 * matrix)
    assert settled.all()
    assert relative_error(factor, expected) < 1e-15 * q * kappa + 1e-14


def test_what_has_no_full_rank_is_never_called_settled() -> None:
    matrix, _ = conditioned(6, 8, 8, 1e8)
    matrix[0, :, 3] = matrix[0, :, 2]
    matrix[1] = 0
    _, settled = isometries(matrix)
    assert not settled.any()


def test_mixed_batches_of_any_size_agree_with_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    easy, _ = conditioned(50, 6, 6, 10.0)
    hard, _ = conditioned(50, 6, 6, 1e10)
    matrix = torch.stack([easy, hard], 1).flatten(0, 1)
    matrix[7] = 0
    matrix[8, :, 0] = 0
    monkeypatch.setattr(module, "_CACHE_NUMBERS", 36 * 33)
    for count in (1, FEWEST - 1, FEWEST, 100):
        found = polar(matrix[:count], 1e-6)
        factor, rank = definition(matrix[:count], 1e-6)
        assert torch.equal(found.rank, rank)
        assert relative_error(found.factor, factor) < 1e-8
    # A cut-off that a settled matrix need not clear is judged by singular values.
    assert polar(matrix, 0.2).rank.max() < 6


def test_rotations_of_a_large_batch_have_determinant_one_and_are_optimal() -> None:
    random = torch.Generator().manual_seed(1)
    source = torch.randn(64, 5, 9, generator=random, dtype=torch.float64)
    target = torch.randn(64, 5, 9, generator=random, dtype=torch.float64)
    free, rotation = procrustes(source, target), procrustes(source, target, True)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(64, dtype=torch.float64))
    proper = torch.linalg.det(free) > 0
    assert 10 < proper.sum() < 54
    assert relative_error(rotation[proper], free[proper]) < 1e-13
    product = target @ source.mT
    values = torch.linalg.svdvals(product)
    best = values.sum(-1) - torch.where(proper, 0.0, 2 * values[:, -1])
    assert torch.allclose((rotation * product).sum((-2, -1)), best)


def test_wide_matrices_go_through_their_transpose() -> None:
    matrix, expected = conditioned(20, 9, 4, 30.0)
    found = polar(matrix.mT)
    assert relative_error(found.factor, expected.mT) < 1e-13
    assert found.rank.tolist() == [4] * 20
