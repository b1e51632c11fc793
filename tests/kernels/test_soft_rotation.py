from __future__ import annotations

from math import atan2, cos, pi, sin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcore_kernels import KernelInputError, backend, soft_rotation
from tests.reference.tolerance import assert_close, relative_error

STRENGTHS = st.sampled_from((0.0, 0.1, 0.4, 0.5, 0.6, 1.0))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def haar(seed: int, count: int, size: int) -> Tensor:
    """Rotations, determinant +1."""
    found = torch.linalg.qr(normal(seed, count, size, size)).Q
    found[..., 0] *= torch.linalg.det(found).sign()[:, None]
    return found


def plane(angle: float) -> Tensor:
    return torch.tensor([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]], dtype=torch.float64)


def inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((-2, -1))


@given(st.integers(1, 6), STRENGTHS, st.integers(0, 2**31), st.integers(0, 5))
def test_rotations_have_determinant_one(size: int, strength: float, seed: int, lost: int) -> None:
    matrix = normal(seed, 4, size, size)
    matrix[0, : min(lost, size)] = 0
    found = soft_rotation(matrix, strength)
    eye = torch.eye(size, dtype=torch.float64).expand(4, size, size)
    assert_close(found.rotation @ found.rotation.mT, eye, size)
    assert (torch.linalg.det(found.rotation) - 1).abs().max() < 1e-13
    assert found.rank.tolist() == [max(size - lost, 0), size, size, size]


@given(st.integers(1, 6), STRENGTHS, st.integers(0, 2**31))
def test_equals_the_definition(size: int, strength: float, seed: int) -> None:
    matrix = normal(seed, 2, 3, size, size)
    with backend("reference"):
        expected = soft_rotation(matrix, strength)
    found = soft_rotation(matrix, strength)
    values = torch.linalg.svdvals(matrix)
    # The rotation is as sensitive as the two weakest directions together are weak.
    weak = (values[..., -2:] / values[..., :1]).sum(-1).min().item()
    blend = soft_rotation(matrix).rotation * strength + (1 - strength) * torch.eye(size).double()
    weak *= torch.linalg.svdvals(blend).min().item() ** 2
    assert_close(found.rotation, expected.rotation, size, condition=10 / weak)
    assert torch.equal(found.rank, expected.rank)
    assert torch.equal(found.singular, expected.singular)


def test_no_rotation_fits_better() -> None:
    matrices = normal(0, 8, 4, 4)
    found = soft_rotation(matrices).rotation
    assert 0 < (torch.linalg.det(matrices) < 0).sum() < 8
    others = haar(1, 800, 4)
    for matrix, rotation in zip(matrices, found, strict=True):
        assert (inner(others, matrix) <= inner(rotation, matrix) + 1e-12).all()


def test_a_rotation_is_found_again_and_the_identity_at_strength_zero() -> None:
    turn = haar(2, 5, 4)
    stretch = normal(3, 5, 4, 9)
    found = soft_rotation(turn @ stretch @ stretch.mT)
    assert relative_error(found.rotation, turn) < 1e-13
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.equal(soft_rotation(turn, 0.0).rotation.abs(), eye.expand(5, 4, 4))
    assert relative_error(soft_rotation(turn, 0.0).rotation, eye.expand(5, 4, 4)) == 0


@given(st.floats(-3.1, 3.1), st.floats(0, 1))
def test_each_plane_turns_by_its_own_part(angle: float, strength: float) -> None:
    other = 0.3
    matrix = torch.block_diag(2 * plane(angle), plane(other))
    parts = (atan2(strength * sin(t), 1 - strength + strength * cos(t)) for t in (angle, other))
    expected = torch.block_diag(*(plane(part) for part in parts))
    found = soft_rotation(matrix, strength)
    assert not found.singular
    assert relative_error(found.rotation, expected) < 1e-12


def test_half_way_to_a_half_turn_falls_back_and_is_flagged() -> None:
    half_turn = torch.block_diag(plane(pi), torch.eye(1).double())
    matrices = torch.stack([half_turn, haar(4, 1, 3)[0]])
    found = soft_rotation(matrices, 0.5)
    assert found.singular.tolist() == [True, False]
    assert torch.equal(found.rotation[0], torch.eye(3, dtype=torch.float64))
    for strength, expected in ((0.49, torch.eye(3).double()), (0.51, half_turn), (1.0, half_turn)):
        turned = soft_rotation(half_turn, strength)
        assert not turned.singular
        assert relative_error(turned.rotation, expected) < 1e-13


def test_a_reflection_is_never_an_answer() -> None:
    """Interpolation towards one would jump: determinant +1 at strength 0.4 and -1 at 0.6."""
    reflection = torch.diag(torch.tensor([3.0, 2.0, -1.0])).double()
    for strength in (0.4, 0.5, 0.6, 1.0):
        found = soft_rotation(reflection, strength)
        assert relative_error(found.rotation, torch.eye(3).double()) < 1e-14
        assert found.rank == 3


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_null_directions_are_completed_towards_the_identity(rank: int) -> None:
    matrix = normal(5, 4, rank) @ normal(6, rank, 4)
    found = soft_rotation(matrix)
    assert found.rank == rank
    values = torch.linalg.svdvals(matrix)
    assert abs(inner(found.rotation, matrix) - values.sum()) < 1e-12 * (1 + values.sum())
    left, _, right = torch.linalg.svd(matrix)
    turns = torch.eye(4, dtype=torch.float64).repeat(500, 1, 1)
    turns[:, rank:, rank:] = torch.linalg.qr(normal(7, 500, 4 - rank, 4 - rank)).Q
    turns[..., -1] *= torch.linalg.det(left @ turns @ right).sign()[:, None]
    others = left @ turns @ right
    assert relative_error(inner(others, matrix), values.sum().expand(500)) < 1e-12
    traces = others.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert (traces <= found.rotation.trace() + 1e-12).all()
    if rank == 0:
        assert torch.equal(found.rotation, torch.eye(4, dtype=torch.float64))


def test_weak_directions_are_kept_down_to_the_cut_off() -> None:
    turn = haar(8, 1, 3)[0]
    matrix = turn @ torch.diag(torch.tensor([1.0, 1e-6, 1e-7])).double()
    assert relative_error(soft_rotation(matrix).rotation, turn) < 1e-8
    assert soft_rotation(matrix, eps_rel=1e-3).rank == 1


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_strength_outside_of_its_range_is_named(strength: float) -> None:
    with pytest.raises(KernelInputError, match=rf"strength is {strength}; pass a number in \[0, 1"):
        soft_rotation(torch.eye(2), strength)


def test_bad_arguments() -> None:
    with pytest.raises(KernelInputError, match=r"matrix has shape \(2, 3\); axis -1 must be 2"):
        soft_rotation(torch.ones(2, 3))
    with pytest.raises(KernelInputError, match=r"eps_rel is 1.0"):
        soft_rotation(torch.eye(2), eps_rel=1.0)
    with pytest.raises(KernelInputError, match=r"matrix has dtype torch.int64"):
        soft_rotation([[1]])
