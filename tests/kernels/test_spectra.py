from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcore_kernels import backend, eigh_small, svd_small
from tests.reference.tolerance import assert_close, tolerance

SPECTRA = ("random", "graded", "deficient", "repeated", "zero")


def matrix(kind: str, p: int, q: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    size = min(p, q)
    left = torch.linalg.qr(torch.randn(2, p, size, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(2, q, size, generator=random, dtype=torch.float64)).Q
    values = {
        "random": torch.rand(size, generator=random, dtype=torch.float64) + 0.1,
        "graded": torch.logspace(0, -10, size, dtype=torch.float64),
        "deficient": torch.arange(size, dtype=torch.float64) % 2,
        "repeated": torch.ones(size, dtype=torch.float64),
        "zero": torch.zeros(size, dtype=torch.float64),
    }[kind]
    return (left * values) @ right.mT


@given(st.sampled_from(SPECTRA), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_svd_reconstructs_orders_and_signs(kind: str, p: int, q: int, seed: int) -> None:
    given_matrix = matrix(kind, p, q, seed)
    left, values, right = svd_small(given_matrix)
    size = min(p, q)
    eye = torch.eye(size, dtype=torch.float64).expand(2, size, size)
    u, s, v = torch.linalg.svd(given_matrix, full_matrices=False)
    assert_close((left * values[:, None]) @ right, given_matrix, size, (u * s[:, None]) @ v)
    assert_close(left.mT @ left, eye, p, u.mT @ u)
    assert_close(right @ right.mT, eye, q, v @ v.mT)
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert (values >= 0).all()
    assert (left.gather(1, left.abs().argmax(1, keepdim=True)) > 0).all()


@given(st.sampled_from(SPECTRA), st.integers(1, 12), st.integers(0, 2**31))
def test_eigh_reconstructs_orders_and_signs(kind: str, n: int, seed: int) -> None:
    half = matrix(kind, n, n, seed)
    given_matrix = half + half.mT
    values, vectors = eigh_small(given_matrix)
    eye = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    assert_close((vectors * values[:, None]) @ vectors.mT, given_matrix, n)
    assert_close(vectors.mT @ vectors, eye, n)
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
    assert_close(values.sum(-1), given_matrix.diagonal(dim1=-2, dim2=-1).sum(-1), n, None, 10)


@pytest.mark.parametrize("op", [svd_small, eigh_small])
def test_equals_the_definition_on_a_simple_spectrum(op) -> None:  # type: ignore[no-untyped-def]
    half = matrix("random", 6, 6, 5)
    with backend("reference"):
        expected = op(half + half.mT)
    for found, wanted in zip(op(half + half.mT), expected, strict=True):
        assert_close(found, wanted, 6, condition=1e3)


def test_signs_survive_a_flip_of_the_basis() -> None:
    """A flipped row of the input flips that coordinate and no convention."""
    given_matrix = matrix("random", 5, 5, 2)[0]
    flip = torch.tensor([1.0, -1, 1, 1, -1], dtype=torch.float64)
    left, _, right = svd_small(given_matrix)
    flipped_left, _, flipped_right = svd_small(flip[:, None] * given_matrix)
    signs = torch.diag(left.mT @ (flip[:, None] * flipped_left))
    assert torch.allclose(signs.abs(), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(signs[:, None] * flipped_right, right)


def test_eigh_uses_the_symmetric_part() -> None:
    given_matrix = torch.tensor([[2.0, 4.0], [0.0, 2.0]])
    assert torch.allclose(eigh_small(given_matrix).values, torch.tensor([4.0, 0.0]), atol=1e-6)


def test_fp32_input_is_solved_in_fp64() -> None:
    graded = matrix("graded", 8, 8, 0).float()
    exact = torch.linalg.svdvals(graded.double())
    found = svd_small(graded).values
    assert found.dtype == torch.float32
    assert ((found - exact) / exact).abs().max() < tolerance(torch.float32)
