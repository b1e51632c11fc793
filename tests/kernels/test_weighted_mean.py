from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcore_kernels import backend, weighted_mean
from fedcore_kernels import weighted_mean as op
from tests.reference.tolerance import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rows(clients: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(clients, size, generator=random, dtype=torch.float64).to(dtype)


@given(
    clients=st.integers(1, 40),
    size=st.integers(1, 257),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    zeros=st.integers(0, 3),
)
def test_is_the_weighted_mean(
    clients: int, size: int, seed: int, dtype: torch.dtype, zeros: int
) -> None:
    updates = rows(clients, size, seed, dtype)
    weights = torch.rand(clients, generator=torch.Generator().manual_seed(seed)) + 0.01
    weights[: min(zeros, clients - 1)] = 0
    with backend("reference"):
        expected = weighted_mean(updates, weights)
    shares = weights.double() / weights.sum()
    assert_close(op(updates, weights), expected, clients, (shares.float() @ updates.float()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_identical_rows_is_that_row(dtype: torch.dtype) -> None:
    row = rows(1, 70_001, 3, dtype)
    for weights in ([1] * 10, [0.1, 0.2, 0.7], [1, 10**9, 3, 7], torch.rand(300)):
        mean = weighted_mean(row.expand(len(weights), -1), weights)
        assert torch.equal(mean.to(dtype), row[0])
        assert torch.equal(mean, row[0].to(mean.dtype))


def test_columns_beyond_one_block_are_averaged_too() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        updates = rows(3, 2**19 + 2**16 + 17, 0, dtype)
        expected = updates.double().mean(0)
        assert (weighted_mean(updates, [1, 1, 1]) - expected).abs().max() < 1e-6


def test_huge_counts_and_values_near_the_fp16_limit_stay_finite_and_right() -> None:
    updates = torch.tensor([[65504.0, -65504.0], [65472.0, 65472.0]], dtype=torch.float16)
    mean = weighted_mean(updates, [1e9, 1e9])
    assert mean.tolist() == [65488.0, -16.0]
    assert weighted_mean(updates, [1e308, 1e308]).tolist() == [65488.0, -16.0]


def test_bfloat16_sums_are_not_rounded_to_bfloat16() -> None:
    updates = torch.cat([torch.ones(1, 8), torch.full((255, 8), 1 / 256)]).bfloat16()
    expected = (1 + 255 / 256) / 256
    assert torch.allclose(weighted_mean(updates, torch.ones(256)), torch.tensor(expected))


def test_a_client_of_weight_zero_is_not_read() -> None:
    updates = rows(4, 33, 1, torch.float32)
    for absent in range(4):
        poisoned = updates.clone()
        poisoned[absent] = float("nan")
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
        weights[absent] = 0
        others = [n for n in range(4) if n != absent]
        expected = weighted_mean(updates[others], weights[others])
        assert torch.equal(weighted_mean(poisoned, weights), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    wide = rows(4, 130, 7, dtype)
    expected = weighted_mean(wide[:, 1:-1:2].contiguous(), [1, 2, 3, 4])
    assert_close(weighted_mean(wide[:, 1:-1:2], [1, 2, 3, 4]), expected.double(), 4)
    columns = wide.T.contiguous().T
    assert_close(weighted_mean(columns, [1, 2, 3, 4]), weighted_mean(wide, [1, 2, 3, 4]).double())


def test_result_dtype_is_fp32_unless_fp64_came_or_another_is_asked_for() -> None:
    for dtype in DTYPES:
        updates = rows(3, 5, 0, dtype)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        assert weighted_mean(updates, [1, 1, 1]).dtype == kept
        half = weighted_mean(updates, [1, 1, 1], dtype=torch.float16)
        assert torch.equal(half, weighted_mean(updates, [1, 1, 1]).half())


def test_takes_numpy_arrays_and_leaves_them_alone() -> None:
    updates = np.arange(6, dtype=np.float32).reshape(2, 3)
    before = updates.copy()
    mean = weighted_mean(updates, np.array([1, 3]))
    assert mean.tolist() == [2.25, 3.25, 4.25]
    assert np.array_equal(updates, before)
