from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedcore_kernels import (
    FactorStep,
    KernelInputError,
    backend,
    nystrom_step,
    whitened_basis,
    whitened_step,
    whitened_sum,
    whitened_upload,
)
from tests.property.stacks import Round, make_round, rounds
from tests.reference.tolerance import assert_close, relative_error


def stream(stack: Tensor, shares: Tensor, previous: Tensor) -> FactorStep:
    """The secure-sum protocol: broadcast T and V, sum the uploads, finish on the server."""
    mixing, basis = whitened_basis(previous)
    total = sum(w * whitened_upload(a, basis) for w, a in zip(shares, stack, strict=True))
    return whitened_step(total, mixing, basis)


@given(rounds(kinds=("random", "strided", "duplicates", "zero_weight", "repeated_spectrum")))
def test_equals_the_batch_form(case: Round) -> None:
    batch = nystrom_step(case.stack, case.weights, case.previous)
    found = stream(case.stack, case.shares, case.previous)
    if batch.condition.max() < 1e3:
        assert relative_error(found.factor, batch.factor) < 1e-10
        assert torch.equal(found.rank, batch.rank)
        assert relative_error(found.condition, batch.condition) < 1e-8


@given(rounds(kinds=("random", "strided", "zero_weight")))
def test_equals_the_definitions(case: Round) -> None:
    mixing, basis = whitened_basis(case.previous)
    calls = (
        lambda: whitened_upload(case.stack[0], basis),
        lambda: whitened_sum(case.stack, case.weights, basis),
    )
    for call in calls:
        with backend("reference"):
            expected = call()
        assert_close(call(), expected, case.stack.shape[-1], condition=10)
    found = whitened_step(expected, mixing, basis)
    with backend("reference"):
        wanted = whitened_step(expected, mixing, basis)
    if wanted.condition.max() < 1e2:
        assert relative_error(found.factor, wanted.factor) < 1e-10
        assert relative_error(found.condition, wanted.condition) < 1e-10
        assert torch.equal(found.rank, wanted.rank)


@pytest.mark.parametrize("lost", ["previous", "clients"])
def test_equals_the_batch_form_at_lost_rank(lost: str) -> None:
    case = make_round("random", 4, 2, 4, 30, seed=1)
    stack, previous = case.stack.clone(), case.previous.clone()
    if lost == "previous":
        previous[:, 3] = previous[:, 0] - previous[:, 1]
    else:
        stack = torch.randn(4, 2, 4, 3, dtype=torch.float64) @ stack[:1, :, :3]
    batch = nystrom_step(stack, case.weights, previous)
    found = stream(stack, case.shares, previous)
    assert found.rank.tolist() == batch.rank.tolist() == [3, 3]
    assert relative_error(found.factor, batch.factor) < 1e-9


def test_the_basis_splits_the_factor() -> None:
    previous = torch.randn(3, 4, 17)
    mixing, basis = whitened_basis(previous)
    assert relative_error(mixing @ basis, previous) < 1e-14
    eye = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert relative_error(basis @ basis.mT, eye) < 1e-14


def test_the_upload_is_linear_in_the_gram_and_blind_to_the_clients_gauge() -> None:
    case = make_round("random", 2, 2, 3, 12, seed=2)
    _, basis = whitened_basis(case.previous)
    client = case.stack[0]
    found = whitened_upload(client, basis)
    assert relative_error(found, basis @ client.mT @ client) < 1e-14
    turn = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64)).Q
    assert relative_error(whitened_upload(turn @ client, basis), found) < 1e-14


@pytest.mark.parametrize(("kappa", "allowed"), [(1e1, 4e-8), (1e2, 1e-6), (1e3, 3e-5)])
def test_single_precision_on_the_wire_suffices(kappa: float, allowed: float) -> None:
    """Error in the weakest direction with an fp32 wire; the plain form loses 3e-2 at 1e3."""
    for seed, noise in ((0, 0.1), (1, 1e-3)):
        random = torch.Generator().manual_seed(seed)
        left = torch.linalg.qr(torch.randn(8, 8, generator=random, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(768, 8, generator=random, dtype=torch.float64)).Q
        values = torch.logspace(0, -torch.tensor(kappa).log10().item(), 8, dtype=torch.float64)
        previous = (left * values @ right.mT)[None]
        drift = torch.randn(20, 1, 8, 768, generator=random, dtype=torch.float64) / 768**0.5
        stack = previous + noise * values[-1] * drift
        expected = nystrom_step(stack, torch.ones(20), previous).factor[0]
        mixing, basis = whitened_basis(previous)
        wire = [whitened_upload(client, basis).float() for client in stack]
        total = torch.stack(wire).double().mean(0)
        found = whitened_step(total, mixing, basis).factor[0]
        u, s, _ = torch.linalg.svd(expected, full_matrices=False)
        assert (u[:, -1] @ (found - expected)).norm() / s[-1] < allowed


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(KernelInputError, match=r"previous has shape \(1, 4, 3\); its rank q"):
        whitened_basis(torch.ones(1, 4, 3))
    with pytest.raises(KernelInputError, match=r"basis has shape \(1, 2, 3\); axis 2 must be 4"):
        whitened_upload(torch.ones(1, 2, 4), torch.ones(1, 2, 3))
    with pytest.raises(KernelInputError, match=r"mixing has shape \(1, 2, 3\); axis 2 must be 2"):
        whitened_step(torch.ones(1, 2, 4), torch.ones(1, 2, 3), torch.ones(1, 2, 4))
