from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore_kernels import backend, product_norm
from tests.reference.tolerance import assert_close


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_equals_the_norm_of_the_dense_product(m: int, p: int, q: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(3, m, p, generator=random)
    right = torch.randn(3, m, q, generator=random)
    with backend("reference"):
        expected = product_norm(left, right)
    assert_close(product_norm(left, right), expected, m + p + q, condition=1e2)


def test_small_differences_keep_their_digits() -> None:
    """Traces of Grams in fp64 see a relative difference of 1e-9 as noise of 1e-8."""
    random = torch.Generator().manual_seed(0)
    b, a, db = (torch.randn(4, 64, generator=random, dtype=torch.float64) for _ in range(3))
    moved = b + 1e-9 * db
    left, right = torch.cat([moved, -b]), torch.cat([a, a])
    expected = ((moved - b).mT @ a).norm()
    assert abs(product_norm(left, right) / expected - 1) < 1e-5
    squared = ((left @ left.mT) * (right @ right.mT)).sum().abs().sqrt()
    assert abs(squared / expected - 1) > 1e-3


def test_zero_and_numpy() -> None:
    assert product_norm(np.zeros((2, 5)), np.ones((2, 3))) == 0
    assert product_norm(np.ones((1, 4)), np.ones((1, 9))) == 6
