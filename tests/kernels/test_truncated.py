from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedcore_kernels import FactorStep, KernelInputError, backend, nystrom_step, truncated_step
from tests.property.stacks import Round, make_round, rounds
from tests.reference.dense import mean_gram, symmetric_root
from tests.reference.tolerance import assert_close, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def step(case: Round, **options: bool) -> FactorStep:
    rank = case.previous.shape[1]
    return truncated_step(case.stack, case.weights, case.previous, rank, **options)


def haar(count: int, size: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=random, dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]


@given(rounds(dtypes=DTYPES))
def test_laws_of_the_step(case: Round) -> None:
    """The Gram misses Q by the tail; ``A A_prev^T`` is positive semi-definite."""
    result = step(case)
    factor, before = result.factor.double(), case.previous.double()
    unit = torch.finfo(result.factor.dtype).eps
    q = mean_gram(case.stack, case.shares)
    missed = torch.linalg.matrix_norm(q - factor.mT @ factor)
    size = torch.linalg.matrix_norm(q)
    assert ((missed - result.tail).abs() <= 200 * unit * size).all()
    overlap = factor @ before.mT
    scale = factor.norm().item() * before.norm().item()
    assert (overlap - overlap.mT).norm().item() < 200 * unit * scale
    assert torch.linalg.eigvalsh(overlap + overlap.mT).min() > -200 * unit * scale
    assert torch.equal(
        result.rank, torch.linalg.matrix_rank(q, rtol=1e-12).clamp(max=before.shape[1])
    )


@pytest.mark.parametrize("seed", range(20))
def test_is_the_best_gram_and_the_nearest_representative(seed: int) -> None:
    case = make_round("random", 6, 1, 4, 60, seed)
    factor, before = step(case).factor[0], case.previous[0]
    with backend("reference"):
        expected = step(case)
    assert relative_error(factor, expected.factor[0]) < 1e-10
    best = (factor - before).norm()
    turned = haar(200, 4, seed) @ factor - before
    assert (torch.linalg.matrix_norm(turned) >= best).all()
    nearby = torch.linalg.matrix_exp(1e-3 * (t := haar(200, 4, seed)) - 1e-3 * t.mT)
    assert (torch.linalg.matrix_norm(nearby @ factor - before) >= best - 1e-14).all()


@given(rounds(kinds=("random", "strided", "zero_weight")))
def test_reports_what_the_definition_reports(case: Round) -> None:
    found = step(case)
    with backend("reference"):
        expected = step(case)
    q = torch.linalg.matrix_norm(mean_gram(case.stack, case.shares))
    assert torch.equal(found.rank, expected.rank)
    assert ((found.tail - expected.tail).abs() < 1e-12 * q).all()
    condition = expected.condition.max().item()
    if condition < 1e4:
        assert_close(found.condition, expected.condition, 10, condition=condition**2)
        assert (found.gap - expected.gap).abs().max() < 1e-13 * condition**2
    assert torch.equal(found.aligned, found.rank)


def test_reflections_are_used() -> None:
    case = make_round("random", 5, 40, 3, 12, seed=0)
    free = step(case)
    flipped = case.previous.clone()
    flipped[:, 0] *= -1
    mirrored = truncated_step(case.stack, case.weights, flipped, 3).factor
    sign = torch.tensor([-1.0, 1, 1], dtype=torch.float64)[:, None]
    assert relative_error(mirrored, sign * free.factor) < 1e-11


def test_low_rank_mean_is_kept_exactly_and_both_variants_agree() -> None:
    """Rank Q = 3 below r = 5: a tall isometry, and no eigenvalue is raised to a floor."""
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        basis = torch.randn(3, 20, generator=random, dtype=torch.float64)
        mix = torch.randn(4, 1, 5, 3, generator=random, dtype=torch.float64)
        previous = torch.randn(1, 5, 20, generator=random, dtype=torch.float64)
        weights = torch.rand(4, generator=random)
        stack = mix @ basis
        result = truncated_step(stack, weights, previous, 5)
        q = mean_gram(stack, weights.double() / weights.double().sum())
        assert result.rank.tolist() == [3]
        assert relative_error(result.factor.mT @ result.factor, q) < 1e-12
        sketched = nystrom_step(stack, weights, previous)
        assert sketched.rank.tolist() == [3]
        assert relative_error(sketched.factor, result.factor) < 1e-9
        assert torch.linalg.svdvals(result.factor)[0, 3:].max() < 1e-13


def test_null_directions_get_no_floor() -> None:
    """A rank-1 Q of size 1e-4: raising eigenvalues to 1e-8 would add rows of size 1e-4."""
    row = torch.zeros(1, 1, 4, 60, dtype=torch.float64)
    row[0, 0, 0, 0] = 1e-2
    result = truncated_step(row, [1], torch.eye(4, 60)[None], 4)
    assert result.rank.tolist() == [1]
    assert torch.equal(result.factor[0, 1:], torch.zeros(3, 60, dtype=torch.float64))
    assert math.isclose(result.factor.square().sum().item(), 1e-4, rel_tol=1e-14)


def test_every_rank_gets_its_own_tail() -> None:
    stack = torch.randn(6, 1, 4, 60, dtype=torch.float64)
    weights = torch.rand(6) + 0.1
    previous = torch.randn(1, 6, 60, dtype=torch.float64)
    q = mean_gram(stack, weights.double() / weights.double().sum())
    values = torch.linalg.eigvalsh(q)[0].flip(0)
    for rank in (2, 4, 6):
        result = truncated_step(stack, weights, previous[:, :rank], rank)
        tail = values[rank:].square().sum().sqrt()
        missed = (q - result.factor.mT @ result.factor).norm()
        assert abs(missed / tail - 1) < 1e-12
        assert abs(result.tail.item() / tail - 1) < 1e-12
        assert abs(result.gap.item() - (1 - values[rank] / values[rank - 1])) < 1e-12


def test_more_rows_than_columns_takes_the_other_side() -> None:
    for kind in ("random", "rank_deficient"):
        case = make_round(kind, 30, 3, 3, 7, seed=1)
        with backend("reference"):
            expected = step(case)
        found = step(case)
        assert relative_error(found.factor, expected.factor) < 1e-10
        assert relative_error(found.tail, expected.tail) < 1e-12


def test_rank_beyond_the_span_is_padded_with_zeros() -> None:
    case = make_round("random", 1, 2, 2, 9, seed=0)
    previous = torch.randn(2, 5, 9, dtype=torch.float64)
    result = truncated_step(case.stack, case.weights, previous, 5)
    client = case.stack[0]
    assert result.rank.tolist() == [2, 2]
    assert relative_error(result.factor.mT @ result.factor, client.mT @ client) < 1e-12
    plain = truncated_step(case.stack, case.weights, None, 5, align=False)
    assert not plain.factor[:, 2:].any()
    assert relative_error(plain.factor.mT @ plain.factor, client.mT @ client) < 1e-12
    assert result.gap.tolist() == [1.0, 1.0]


def test_without_alignment_rows_are_orthogonal_ordered_and_signed() -> None:
    case = make_round("random", 4, 3, 3, 20, seed=3)
    result = truncated_step(case.stack, case.weights, None, 3, align=False)
    with backend("reference"):
        expected = truncated_step(case.stack, case.weights, None, 3, align=False).factor
    assert relative_error(result.factor, expected) < 1e-11
    products = result.factor @ result.factor.mT
    norms = products.diagonal(dim1=-2, dim2=-1)
    assert relative_error(products, torch.diag_embed(norms)) < 1e-13
    assert (norms[:, :-1] > norms[:, 1:]).all()
    assert result.aligned.tolist() == [0, 0, 0]


def test_without_alignment_null_directions_are_zero_too() -> None:
    case = make_round("duplicates", 4, 2, 3, 20, seed=5)
    stack = case.stack.clone()
    stack[:, 1, 2] = stack[:, 1, 0] - stack[:, 1, 1]
    result = truncated_step(stack, case.weights, None, 3, align=False)
    assert result.rank.tolist() == [3, 2]
    assert result.factor[0, 2].norm() > 0.1
    assert not result.factor[1, 2].any()


def test_a_deficient_previous_factor_is_flagged_and_costs_no_energy() -> None:
    case = make_round("random", 4, 2, 3, 20, seed=4)
    previous = case.previous.clone()
    previous[1, 2] = previous[1, 0]
    result = truncated_step(case.stack, case.weights, previous, 3)
    assert result.rank.tolist() == [3, 3]
    assert result.aligned.tolist() == [3, 2]
    missed = mean_gram(case.stack, case.shares) - result.factor.mT @ result.factor
    assert relative_error(torch.linalg.matrix_norm(missed), result.tail) < 1e-10


def test_covariance_split() -> None:
    """``Q = Abar^T Abar + sum_n w_n dA_n^T dA_n``: the step keeps what averaging factors loses."""
    case = make_round("random", 6, 1, 4, 60, seed=7)
    mean = torch.einsum("n,nlrk->lrk", case.shares, case.stack)
    covariance = mean_gram(case.stack - mean, case.shares)
    q = mean_gram(case.stack, case.shares)
    assert relative_error(mean.mT @ mean + covariance, q) < 1e-13
    result = truncated_step(case.stack, case.weights, torch.eye(60)[None], 60)
    assert relative_error(result.factor.mT @ result.factor, mean.mT @ mean + covariance) < 1e-12


def test_drift_is_the_bures_wasserstein_distance_at_low_rank() -> None:
    for seed in range(10):
        case = make_round("random", 1, 1, 4, 30, seed)
        factor, before = step(case).factor[0], case.previous[0]
        q, q_prev = mean_gram(case.stack, case.shares)[0], before.mT @ before
        root = symmetric_root(q_prev, 0.5)
        cross = torch.linalg.eigvalsh(root @ q @ root).clamp(min=0).sqrt().sum()
        distance = q_prev.trace() + q.trace() - 2 * cross
        assert abs((factor - before).square().sum() / distance - 1) < 1e-5


def test_orders_in_the_step_size() -> None:
    """One round of ``A - eta G_n``: tail of order 2, gap between the variants of order 3."""
    random = torch.Generator().manual_seed(0)
    before = torch.randn(1, 3, 40, generator=random, dtype=torch.float64)
    gradients = torch.randn(8, 1, 3, 40, generator=random, dtype=torch.float64)
    tails, gaps = [], []
    for eta in (0.01, 0.005, 0.0025):
        stack = before - eta * gradients
        best = truncated_step(stack, torch.ones(8), before, 3)
        other = nystrom_step(stack, torch.ones(8), before).factor
        tails.append(best.tail.item())
        difference = best.factor.mT @ best.factor - other.mT @ other
        gaps.append(torch.linalg.matrix_norm(difference).item())
    for values, order in ((tails, 2), (gaps, 3)):
        for coarse, fine in pairwise(values):
            assert abs(math.log2(coarse / fine) - order) < 0.1


def test_bad_ranks_are_named() -> None:
    case = make_round("random", 2, 1, 2, 5, seed=0)
    with pytest.raises(KernelInputError, match="rank is 0; pass at least 1"):
        truncated_step(case.stack, case.weights, case.previous, 0)
    with pytest.raises(KernelInputError, match="rank is 3 and previous has 2 rows"):
        truncated_step(case.stack, case.weights, case.previous, 3)
    with pytest.raises(KernelInputError, match="previous is None"):
        truncated_step(case.stack, case.weights, None, 2)
