"""FLoRG's steps on the device against their definitions, their laws and 60-digit arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fedcore_kernels import FactorStep, backend, nystrom_step, truncated_step
from tests.property.graded import graded_clients
from tests.property.stacks import KINDS, Round, make_round, rounds
from tests.reference import exact
from tests.reference.dense import mean_gram
from tests.reference.placement import placed
from tests.reference.tolerance import UNITS, assert_close, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Clients times rank stay small or beyond the Jacobi kernels, which the interpreter runs slowly.
SHAPES = [(1, 1, 1, 33), (2, 2, 3, 200), (300, 1, 1, 33), (11, 1, 7, 64), (2, 1, 3, 1000)]

# Above the rounding of 16-bit Grams and below the spectra of the cases: both sides cut alike.
CUT = 1e-6


def sketched(case: Round, device: torch.device, **options: Any) -> FactorStep:
    stack, previous = placed(case.stack, device), placed(case.previous, device)
    with backend("triton"):
        return cpu(nystrom_step(stack, case.weights, previous, **options))


def truncated(case: Round, device: torch.device, rank: int, **options: Any) -> FactorStep:
    stack, previous = placed(case.stack, device), placed(case.previous, device)
    with backend("triton"):
        return cpu(truncated_step(stack, case.weights, previous, rank, **options))


def cpu(step: FactorStep) -> FactorStep:
    return FactorStep(*(field.cpu() for field in step))


def check(found: FactorStep, expected: FactorStep, dtype: torch.dtype, width: int) -> None:
    """Every field; ``tail`` is an error of the Gram and measured against its size."""
    wide = dtype == torch.float64
    precision = torch.float64 if wide else torch.float32
    assert found.factor.dtype == precision
    assert torch.equal(found.rank, expected.rank)
    sure = expected.condition[expected.rank > 0].max().item()
    # In fp64 both sides go through a Gram, whose condition is the square.
    condition = sure**2 if wide else sure
    assert_close(found.factor, expected.factor, width, condition=condition)
    present = expected.rank > 0
    spread = found.condition[present].to(precision)
    assert_close(spread, expected.condition[present], width, condition=condition)
    assert torch.equal(found.gap.isnan(), expected.gap.isnan())
    if not expected.gap.isnan().any():
        size = expected.factor.double().square().sum((1, 2))
        assert_close((size + found.tail).to(precision), size + expected.tail, width)
        assert_close(1 + found.gap.to(precision), 1 + expected.gap, width, condition=condition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sketched_step_of_every_dtype_and_shape(
    dtype: torch.dtype, shape: tuple[int, int, int, int], device: torch.device
) -> None:
    case = make_round("random", *shape, seed=3, dtype=dtype)
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, case.previous, CUT)
    check(sketched(case, device, eps_rel=CUT), expected, dtype, shape[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncated_step_of_every_dtype_and_shape(
    dtype: torch.dtype, shape: tuple[int, int, int, int], device: torch.device
) -> None:
    case = make_round("random", *shape, seed=3, dtype=dtype)
    with backend("reference"):
        expected = truncated_step(case.stack, case.weights, case.previous, shape[2], eps_rel=CUT)
    check(truncated(case, device, shape[2], eps_rel=CUT), expected, dtype, shape[3])


@pytest.mark.parametrize("rank", [24, 72])
def test_ranks_at_and_beyond_the_small_decompositions(rank: int, device: torch.device) -> None:
    case = make_round("random", 2, 1, rank, 200, seed=3, dtype=torch.float32)
    if rank > 64:
        with backend("reference"):
            expected = truncated_step(case.stack, case.weights, case.previous, rank)
        check(truncated(case, device, rank), expected, torch.float32, 200)
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, case.previous)
    check(sketched(case, device), expected, torch.float32, 200)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_of_every_kind(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    case = make_round(kind, 3, 2, 2, 40, seed=5, dtype=dtype)
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, case.previous, CUT)
        best = truncated_step(case.stack, case.weights, case.previous, 2, eps_rel=CUT)
    check(sketched(case, device, eps_rel=CUT), expected, dtype, 40)
    found = truncated(case, device, 2, eps_rel=CUT)
    check(found, best, dtype, 40)
    assert torch.equal(found.aligned, found.rank)


@given(
    rounds(
        max_clients=4,
        max_modules=2,
        max_rank=2,
        max_width=40,
        dtypes=DTYPES[:2],
    )
)
@settings(max_examples=10)
def test_laws_of_the_sketched_step(device: torch.device, case: Round) -> None:
    """``A A_prev^T`` and ``Q - A^T A`` are positive semi-definite up to rounding."""
    factor, before = sketched(case, device).factor.double(), case.previous.double()
    assert factor.isfinite().all()
    unit = 64 * torch.finfo(torch.float32).eps
    q = mean_gram(case.stack, case.shares)
    size = torch.linalg.matrix_norm(q, 2).max()
    overlap = factor @ before.mT
    scale = factor.norm() * before.norm() + 1e-30
    assert (overlap - overlap.mT).norm() < unit * scale
    assert torch.linalg.eigvalsh(overlap + overlap.mT).min() > -unit * scale
    assert torch.linalg.eigvalsh(q - factor.mT @ factor).min() > -unit * size


@pytest.mark.parametrize("kappa", [1e1, 1e2, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weakest_direction_against_sixty_digits(
    kappa: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Errors of the step alone: the definition gets the uploads as they were rounded.

    A row of the result is rounded to u of the largest, which is u kappa of the weakest direction:
    the bound of results in fp32. Where a Gram decides, its own rounding u counts squared and over
    the gap: for fp64 uploads, and for ``truncated`` of 16-bit uploads, with the u of fp32, which
    says nothing from kappa 1e3 on.
    """
    clients, weights, previous = graded_clients(kappa, 1.0, seed=2)
    clients, previous = clients[:4].to(dtype), previous.to(dtype)
    case = Round("graded", clients[:, None], weights[:4], previous[None])
    unit = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps / 2
    linear, square = UNITS * unit * kappa, UNITS * unit * kappa**2
    step = sketched(case, device)
    wanted = exact.sketched(clients.double(), weights[:4], previous.double())
    error = exact.weakest_direction_error(step.factor[0], wanted)
    assert step.rank.item() == 4
    assert error < (square if dtype == torch.float64 else linear)
    if dtype == torch.bfloat16 and kappa > 1e2:
        return
    step = truncated(case, device, 4)
    wanted = exact.truncated(clients.double(), weights[:4], previous.double(), 4)
    error = exact.weakest_direction_error(step.factor[0], wanted)
    assert step.rank.item() == 4
    assert error < (linear if dtype == torch.float32 else square / step.gap.item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_previous_factor_that_lost_rank(dtype: torch.dtype, device: torch.device) -> None:
    """Sums of rows are null directions of it, whatever the rounding of their Gram."""
    case = make_round("random", 3, 2, 3, 160, seed=8, dtype=dtype)
    previous = (case.previous * 4).round() / 4
    previous[0, 2] = previous[0, 0] + previous[0, 1]
    case = Round("lost", case.stack, case.weights, previous)
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, previous, CUT)
    assert expected.rank.tolist() == [2, 3]
    found = sketched(case, device)
    check(found, expected, dtype, 160)
    direction = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64) / 3**0.5
    assert (direction @ found.factor[0].double()).norm() < 1e-6 * found.factor[0].norm()
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, previous, CUT, on_rank_loss="keep_prev")
    check(sketched(case, device, on_rank_loss="keep_prev"), expected, dtype, 160)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uploads_in_a_common_subspace(dtype: torch.dtype, device: torch.device) -> None:
    """All rows are combinations of two; rounding must not pass for a third direction."""
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        # Sums of 16-bit numbers need integers to stay in the subspace.
        basis, mix = (
            torch.randn(rows, columns, generator=random, dtype=torch.float64)
            for rows, columns in ((2, 60), (6, 2))
        )
        if dtype != torch.float64:
            basis, mix = (2 * basis).round(), (2 * mix).round()
        stack = (mix @ basis).reshape(2, 1, 3, 60).to(dtype)
        previous = torch.randn(1, 3, 60, generator=random).to(dtype)
        case = Round("subspace", stack, torch.ones(2), previous)
        for step, options in ((sketched, ()), (truncated, (3,))):
            found = step(case, device, *options)
            assert found.rank.tolist() == [2]
            values = torch.linalg.svdvals(found.factor[0].double())
            assert values[2] < 1e-6 * values[0]


def test_what_was_lost_is_carried_on_if_asked(device: torch.device) -> None:
    case = make_round("random", 3, 1, 2, 20, seed=8, dtype=torch.float32)
    stack, previous = case.stack.clone(), case.previous.clone()
    stack[..., 19] = previous[0, 0, 19] = 0
    previous[0, 1] = 0
    previous[0, 1, 19] = 5.0
    case = Round("lost", stack, case.weights, previous)
    zeroed, kept = sketched(case, device), sketched(case, device, on_rank_loss="keep_prev")
    assert zeroed.rank.tolist() == kept.rank.tolist() == [1]
    assert zeroed.factor[0, 1].norm() < 1e-6
    assert torch.allclose(kept.factor[0, 1], previous[0, 1])
    assert torch.allclose(kept.factor[0, 0], zeroed.factor[0, 0])


def test_clients_without_overlap_give_zero_and_rank_zero(device: torch.device) -> None:
    case = Round("zero", torch.zeros(2, 1, 2, 8), torch.ones(2), torch.ones(1, 2, 8))
    for step in (sketched(case, device), truncated(case, device, 2)):
        assert step.rank.tolist() == [0]
        assert not step.factor.any()
        assert step.condition.isinf().all()


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(("rank", "rows"), [(1, 2), (2, 3), (3, 3)])
def test_a_truncated_step_to_another_rank(
    align: bool, rank: int, rows: int, device: torch.device
) -> None:
    case = make_round("random", 2, 2, 3, 50, seed=10, dtype=torch.float32)
    before = torch.randn(2, rows, 50, generator=torch.Generator().manual_seed(0))
    case = Round("other", case.stack, case.weights, before)
    with backend("reference"):
        expected = truncated_step(case.stack, case.weights, before, rank, align=align)
    found = truncated(case, device, rank, align=align)
    gap = expected.gap.min().item()
    assert_close(found.factor, expected.factor, 50, condition=1 / gap)
    assert torch.equal(found.rank, expected.rank)
    assert found.aligned.tolist() == ([rank] * 2 if align else [0] * 2)


@pytest.mark.parametrize("rows", [1, 4])
def test_ranks_of_clients_and_server_may_differ(rows: int, device: torch.device) -> None:
    case = make_round("random", 3, 2, 3, 20, seed=10, dtype=torch.float32)
    before = torch.randn(2, rows, 20, generator=torch.Generator().manual_seed(0))
    case = Round("other", case.stack, case.weights, before)
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, before)
    check(sketched(case, device), expected, torch.float32, 20)


def test_without_alignment_the_same_gram_in_its_principal_gauge(device: torch.device) -> None:
    case = make_round("random", 2, 2, 2, 40, seed=9, dtype=torch.float32)
    for step, options in ((sketched, ()), (truncated, (2,))):
        aligned = step(case, device, *options).factor
        found = step(case, device, *options, align=False)
        factor = found.factor
        assert_close(factor.mT @ factor, aligned.double().mT @ aligned.double(), 40)
        products = factor.double() @ factor.double().mT
        norms = products.diagonal(dim1=-2, dim2=-1)
        assert relative_error(products, torch.diag_embed(norms)) < 1e-5
        assert (norms[:, :-1] >= norms[:, 1:]).all()
        assert (factor.gather(2, factor.abs().argmax(2, keepdim=True)) > 0).all()
        assert found.aligned.tolist() == [0, 0]


def test_order_splitting_and_absence_of_clients_do_not_matter(device: torch.device) -> None:
    case = make_round("random", 3, 1, 2, 40, seed=6, dtype=torch.float32)
    stack, weights = case.stack, case.weights
    order = torch.tensor([2, 0, 1])
    split = torch.cat([weights, weights[:1]])
    split[[0, -1]] /= 2
    absent = torch.cat([weights, torch.zeros(1, dtype=torch.float64)])
    for step, options in ((sketched, ()), (truncated, (2,))):
        expected = step(case, device, *options).factor
        for other, counts in (
            (stack[order], weights[order]),
            (torch.cat([stack, stack[:1]]), split),
            (torch.cat([stack, 1e3 * stack[:1]]), absent),
        ):
            found = step(Round("same", other, counts, case.previous), device, *options).factor
            assert_close(found, expected, 40)


def test_the_gauge_of_the_clients_has_no_effect_and_that_of_the_server_carries_over(
    device: torch.device,
) -> None:
    case = make_round("random", 3, 1, 2, 40, seed=2)
    random = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(3, 1, 2, 2, generator=random, dtype=torch.float64)).Q
    other = Round("turned", turns @ case.stack, case.weights, turns[0] @ case.previous)
    for step, options in ((sketched, ()), (truncated, (2,))):
        expected = turns[0] @ step(case, device, *options).factor
        assert_close(step(other, device, *options).factor, expected, 40, condition=10)


def test_two_runs_are_equal_to_the_bit(device: torch.device) -> None:
    case = make_round("random", 2, 2, 2, 600, seed=2, dtype=torch.float32)
    for step, options in ((sketched, ()), (truncated, (2,))):
        one, two = step(case, device, *options), step(case, device, *options)
        for left, right in zip(one, two, strict=True):
            assert torch.equal(left.nan_to_num(-1.0), right.nan_to_num(-1.0))
