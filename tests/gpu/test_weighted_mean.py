"""The Triton mean against its definition, and the laws of a running mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcore_kernels import backend, weighted_mean
from tests.reference.placement import placed
from tests.reference.tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rows(clients: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(clients, size, generator=random, dtype=torch.float64).to(dtype)


def counts(clients: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 1000, (clients,), generator=random)


def on_triton(updates: Tensor, weights: object, device: torch.device) -> Tensor:
    with backend("triton"):
        return weighted_mean(placed(updates, device), weights).cpu()


def check(updates: Tensor, weights: Tensor, device: torch.device) -> None:
    with backend("reference"):
        expected = weighted_mean(updates, weights)
    found = on_triton(updates, weights, device)
    assert found.dtype == (torch.float64 if updates.dtype == torch.float64 else torch.float32)
    assert_close(found, expected, len(updates))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("clients", "size"), [(1, 33), (3, 200), (17, 1040), (5, 2048), (300, 7)])
def test_is_the_weighted_mean(
    dtype: torch.dtype, clients: int, size: int, device: torch.device
) -> None:
    check(rows(clients, size, dtype), counts(clients), device)


@given(
    clients=st.integers(1, 20),
    size=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    first=st.integers(0, 9),
    after=st.integers(0, 9),
    absent=st.sets(st.integers(1, 19)),
)
@settings(max_examples=25)
def test_column_slices_of_a_bigger_matrix(
    device: torch.device,
    clients: int,
    size: int,
    dtype: torch.dtype,
    first: int,
    after: int,
    absent: set[int],
) -> None:
    """Any offset and stride of the rows; whatever stands beside the slice is not seen."""
    whole = torch.full((clients, first + size + after), float("nan"), dtype=dtype)
    updates = whole[:, first : first + size]
    updates.copy_(rows(clients, size, dtype))
    weights = counts(clients)
    weights[[i for i in absent if i < clients]] = 0
    check(updates, weights, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_of_identical_rows_is_that_row(dtype: torch.dtype, device: torch.device) -> None:
    row = rows(1, 1057, dtype, seed=3)
    for weights in ([1] * 10, [0.1, 0.2, 0.7], [1, 10**9, 3, 7], torch.rand(19)):
        mean = on_triton(row.expand(len(weights), -1), weights, device)
        assert torch.equal(mean, row[0].to(mean.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_client_of_weight_zero_is_not_read(dtype: torch.dtype, device: torch.device) -> None:
    """Wherever it stands, also alone in front of the first that counts."""
    updates, weights = rows(6, 130, dtype), counts(6)
    weights[[0, 1, 4]] = 0
    present = on_triton(updates[weights > 0], weights[weights > 0], device)
    for poison in (float("nan"), float("inf")):
        spoilt = updates.clone()
        spoilt[weights == 0] = poison
        assert torch.equal(on_triton(spoilt, weights, device), present)


def test_values_at_the_fp16_limit_with_huge_counts_stay_finite(device: torch.device) -> None:
    updates = torch.tensor([[65504.0, -65504.0], [65472.0, 65472.0]], dtype=torch.float16)
    mean = on_triton(updates, [10**9, 10**9], device)
    assert mean.tolist() == [65488.0, -16.0]


def test_nan_and_infinity_of_a_client_that_counts_arrive(device: torch.device) -> None:
    updates = rows(3, 4, torch.float32)
    updates[1, 0], updates[2, 1] = float("nan"), float("inf")
    mean = on_triton(updates, [1, 2, 3], device)
    assert mean[0].isnan()
    assert mean[1] == float("inf")
    assert mean[2:].isfinite().all()


def test_order_and_splitting_of_clients_do_not_matter(device: torch.device) -> None:
    updates, weights = rows(7, 100, torch.float32), counts(7) * 2
    mean = on_triton(updates, weights, device)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    assert_close(on_triton(updates[order], weights[order], device), mean, 7)
    halves = weights.clone()
    halves[2] //= 2
    split = torch.cat([updates, updates[2:3]]), torch.cat([halves, halves[2:3]])
    assert_close(on_triton(*split, device), mean, 7)


def test_two_runs_are_equal_to_the_bit(device: torch.device) -> None:
    updates, weights = rows(19, 1500, torch.bfloat16), counts(19)
    first = on_triton(updates, weights, device)
    assert torch.equal(first, on_triton(updates, weights, device))
