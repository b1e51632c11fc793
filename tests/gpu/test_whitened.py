"""The whitened form: one read of the uploads where it fits, two where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore_kernels import (
    backend,
    nystrom_step,
    whitened_basis,
    whitened_step,
    whitened_sum,
    whitened_upload,
)
from fedcore_kernels.cuda import whitened
from fedcore_kernels.cuda.configurations import for_architecture
from tests.property.stacks import KINDS, Round, make_round
from tests.reference.tolerance import assert_close, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def on(device: torch.device, case: Round) -> tuple[Tensor, Tensor, Tensor]:
    return case.stack.to(device), case.weights, case.previous.to(device)


def definition(stack: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    with backend("reference"):
        return whitened_sum(stack.cpu(), weights, basis.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("clients", "rank", "width"), [(1, 1, 33), (5, 3, 200), (7, 8, 130), (3, 16, 64), (2, 24, 40)]
)
def test_sum_of_every_dtype_and_shape(
    dtype: torch.dtype, clients: int, rank: int, width: int, device: torch.device
) -> None:
    stack, weights, previous = on(
        device, make_round("random", clients, 2, rank, width, 1, dtype=dtype)
    )
    with backend("torch"):
        _, basis = whitened_basis(previous.double())
    with backend("triton"):
        found = whitened_sum(stack, weights, basis)
    assert_close(found.cpu(), definition(stack, weights, basis), width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_three_steps_are_the_sketched_step(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = make_round(kind, 4, 2, 3, 50, 2, dtype=dtype)
    stack, weights, previous = on(device, case)
    with backend("triton"):
        mixing, basis = whitened_basis(previous)
        found = whitened_step(whitened_sum(stack, weights, basis), mixing, basis)
    with backend("reference"):
        expected = nystrom_step(case.stack, weights, case.previous)
    assert_close(mixing @ basis, previous.double(), 50)
    assert torch.equal(found.rank.cpu(), expected.rank)
    # Row i of the sum carries the square of its direction, so that rounding counts as condition^2.
    condition = expected.condition.max().item()
    assert_close(found.factor.cpu(), expected.factor, 50, condition=condition**2)


def test_a_factor_that_fits_is_read_once_and_a_wider_one_twice(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    one_pass, cross = whitened.one_pass_kernel, whitened.cross_gram_rows

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            passes.append("one")
            return one_pass[grid]

    def spy(*arguments: Any) -> Tensor:
        passes.append("two")
        return cross(*arguments)

    monkeypatch.setattr(whitened, "one_pass_kernel", Spy())
    monkeypatch.setattr(whitened, "cross_gram_rows", spy)
    settings = {"width": 64, "split": 8, "warps": 8, "stages": 1}
    monkeypatch.setattr(whitened, "configuration", lambda *_: settings)
    found = []
    for width in (64, 65):
        case = make_round("random", 5, 1, 3, width, 3, dtype=torch.float32)
        stack, weights, previous = on(device, case)
        _, basis = whitened_basis(previous.double())
        with backend("triton"), for_architecture(90):
            found.append(whitened_sum(stack, weights, basis))
        assert_close(found[-1].cpu(), definition(stack, weights, basis), width)
    assert passes == ["one", "two"]


def test_an_upload_is_the_sum_of_one_client(device: torch.device) -> None:
    stack, weights, previous = on(device, make_round("strided", 3, 2, 3, 40, 4))
    _, basis = whitened_basis(previous)
    with backend("triton"):
        uploads = torch.stack([whitened_upload(client, basis) for client in stack])
        total = whitened_sum(stack, weights, basis)
    shares = (weights / weights.sum()).to(device)
    assert relative_error(torch.einsum("n,nlqk->lqk", shares, uploads), total) < 1e-13


def test_a_direction_that_the_previous_factor_lacks_is_zero_and_counted(
    device: torch.device,
) -> None:
    case = make_round("random", 4, 1, 3, 30, 5)
    stack, weights, previous = on(device, case)
    previous = previous.clone()
    previous[0, 2] = previous[0, 0]
    with backend("triton"):
        mixing, basis = whitened_basis(previous)
        found = whitened_step(whitened_sum(stack, weights, basis), mixing, basis)
    assert not basis[0, 2].any()
    assert relative_error(mixing @ basis, previous) < 1e-13
    assert found.rank.tolist() == [2]
    with backend("reference"):
        expected = nystrom_step(case.stack, weights, previous.cpu(), 1e-7)
    assert relative_error(found.factor.cpu(), expected.factor) < 1e-7
