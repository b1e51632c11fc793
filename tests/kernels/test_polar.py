from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcore_kernels import KernelInputError, backend, polar, procrustes
from tests.reference.tolerance import assert_close


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def haar(seed: int, size: int, count: int) -> Tensor:
    q, r = torch.linalg.qr(normal(seed, count, size, size))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_polar_is_orthonormal_on_the_smaller_side_and_leaves_a_psd_factor(
    p: int, q: int, seed: int
) -> None:
    matrix = normal(seed, 3, p, q)
    factor, rank = polar(matrix)
    size = min(p, q)
    eye = torch.eye(size, dtype=torch.float64).expand(3, size, size)
    inner = factor @ factor.mT if p <= q else factor.mT @ factor
    assert_close(inner, eye, max(p, q))
    assert rank.tolist() == [size] * 3
    stretch = factor.mT @ matrix if q <= p else matrix @ factor.mT
    assert_close(stretch, stretch.mT, max(p, q), condition=10)
    assert torch.linalg.eigvalsh(stretch + stretch.mT).min() > -1e-12
    with backend("reference"):
        condition = torch.linalg.cond(matrix).max().item()
        assert_close(factor, polar(matrix).factor, max(p, q), condition=condition)


def test_polar_attains_the_nuclear_norm_and_no_isometry_exceeds_it() -> None:
    matrix = normal(0, 4, 4)
    attained = (polar(matrix).factor * matrix).sum()
    assert abs(attained - torch.linalg.svdvals(matrix).sum()) < 1e-12
    assert ((haar(1, 4, 500) * matrix).sum((-2, -1)) <= attained + 1e-12).all()


def test_null_directions_are_zero_and_counted_never_completed() -> None:
    left, right = haar(0, 5, 1)[0, :, :2], haar(1, 4, 1)[0, :2]
    matrix = left @ torch.diag(torch.tensor([3.0, 1e-3], dtype=torch.float64)) @ right
    factor, rank = polar(matrix)
    assert rank == 2
    assert_close(factor, left @ right, 5, condition=3e3)
    factor, rank = polar(matrix, cutoff=1e-2)
    assert rank == 1
    assert_close(factor, left[:, :1] @ right[:1], 5, condition=10)
    factor, rank = polar(torch.zeros(3, 2))
    assert rank == 0
    assert not factor.any()


def test_regularisation_completes_towards_the_identity() -> None:
    matrix = torch.diag(torch.tensor([2.0, 0.0, 0.0]))
    assert torch.allclose(polar(matrix, regularisation=1e-3).factor, torch.eye(3))
    matrix = normal(3, 3, 3)
    shifted = matrix + 0.1 * matrix.norm() * torch.eye(3)
    found, expected = polar(matrix, regularisation=0.1), polar(shifted)
    assert torch.allclose(found.factor, expected.factor, atol=1e-12)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**31))
def test_procrustes_recovers_an_isometry(p: int, extra: int, seed: int) -> None:
    isometry = haar(seed, p + extra, 1)[0, :, :p]
    source = normal(seed + 1, p, p + 7)
    found = procrustes(source, isometry @ source)
    assert_close(found, isometry, p + 7, condition=torch.linalg.cond(source).item() ** 2)


def test_procrustes_is_optimal_when_the_target_has_as_many_rows() -> None:
    for q in (3, 5):
        source, target = normal(q, 3, 8), normal(q + 1, q, 8)
        best = (procrustes(source, target) @ source - target).norm()
        others = haar(2, q, 500)[:, :, :3] @ source - target
        assert (torch.linalg.matrix_norm(others) >= best - 1e-12).all()


def test_procrustes_to_fewer_rows_maximises_the_inner_product() -> None:
    source, target = normal(0, 5, 8), normal(1, 3, 8)
    found = procrustes(source, target)
    assert_close(found @ found.mT, torch.eye(3, dtype=torch.float64), 5)
    attained = ((found @ source) * target).sum()
    others = ((haar(2, 5, 500)[:, :3] @ source) * target).sum((-2, -1))
    assert (others <= attained + 1e-12).all()


def test_rotation_only_has_determinant_one_and_is_the_best_such() -> None:
    source, target = normal(4, 6, 4, 9), normal(5, 6, 4, 9)
    free, found = procrustes(source, target), procrustes(source, target, rotation_only=True)
    assert torch.allclose(torch.linalg.det(found), torch.ones(6, dtype=torch.float64))
    reflections = torch.linalg.det(free) < 0
    assert 0 < reflections.sum() < 6
    assert torch.equal(free[~reflections], found[~reflections])
    rotations = haar(6, 4, 800)
    rotations[:, 0] *= torch.linalg.det(rotations).sign()[:, None]
    for one, other, turn in zip(source, target, found, strict=True):
        best = (turn @ one - other).norm()
        assert (torch.linalg.matrix_norm(rotations @ one - other) >= best - 1e-12).all()
    with backend("reference"):
        assert_close(found, procrustes(source, target, True), 9, condition=1e2)


def test_a_rotation_needs_equal_numbers_of_rows() -> None:
    with pytest.raises(KernelInputError, match=r"target has shape \(2, 5\).*must be 3"):
        procrustes(torch.ones(3, 5), torch.ones(2, 5), rotation_only=True)
