from __future__ import annotations

import pytest
import torch
from hypothesis import given

from fedcore_kernels import KernelInputError, backend, nystrom_step
from tests.property.stacks import Round, make_round, rounds
from tests.reference import florg
from tests.reference.dense import mean_gram, stacked, symmetric_root
from tests.reference.tolerance import assert_close, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def step(case: Round, **options: object) -> torch.Tensor:
    return nystrom_step(case.stack, case.weights, case.previous, **options).factor  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_four_forms_are_one(seed: int) -> None:
    """Eigenvectors with Procrustes = polar = inverse root = inverse root of the summed Y_n."""
    case = make_round("random", 6, 2, 4, 60, seed)
    found = step(case)
    before = case.previous
    y = sum(w * (before @ a.mT) @ a for w, a in zip(case.shares, case.stack, strict=True))
    forms = {
        "eigenvectors": florg.sketched(case.stack, case.shares, before),
        "inverse root": florg.inverse_root_form(case.stack, case.shares, before),
        "streaming": symmetric_root(y @ before.mT, -0.5) @ y,
    }
    for form in forms.values():
        assert relative_error(found, form) < 1e-10
    q = mean_gram(case.stack, case.shares)
    k = before @ q @ before.mT
    gram = q @ before.mT @ torch.linalg.inv(k) @ before @ q
    assert relative_error(found.mT @ found, gram) < 1e-10


@given(rounds(dtypes=DTYPES))
def test_laws_of_the_step(case: Round) -> None:
    """``A A_prev^T`` and ``Q - A^T A`` are positive semi-definite; the rank is that of A."""
    result = nystrom_step(case.stack, case.weights, case.previous)
    factor, before = result.factor.double(), case.previous.double()
    unit = torch.finfo(result.factor.dtype).eps
    q = mean_gram(case.stack, case.shares)
    size = torch.linalg.matrix_norm(q, 2).max().item()
    overlap = factor @ before.mT
    scale = overlap.norm().item() + 1e-30
    assert (overlap - overlap.mT).norm().item() < 100 * unit * scale * (1 + before.norm().item())
    assert torch.linalg.eigvalsh(overlap + overlap.mT).min() > -100 * unit * scale
    assert torch.linalg.eigvalsh(q - factor.mT @ factor).min() > -100 * unit * size
    wide = before @ stacked(case.stack, case.shares.sqrt()).mT
    assert torch.equal(result.rank, torch.linalg.matrix_rank(wide, rtol=1e-12))
    assert not factor.isnan().any()


@given(rounds(kinds=("random", "strided", "zero_weight"), max_modules=2))
def test_equals_the_definition(case: Round) -> None:
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, case.previous)
    found = nystrom_step(case.stack, case.weights, case.previous)
    condition = expected.condition.max().item()
    if condition < 1e5:
        assert_close(found.factor, expected.factor, case.stack.shape[-1], condition=condition**2)
        assert_close(found.condition, expected.condition, 10, condition=condition)
        assert torch.equal(found.rank, expected.rank)


def test_the_gauge_of_the_clients_has_no_effect_and_that_of_the_server_carries_over() -> None:
    case = make_round("random", 5, 3, 4, 31, seed=2)
    turns = torch.linalg.qr(torch.randn(5, 3, 4, 4, dtype=torch.float64)).Q
    turned = nystrom_step(turns @ case.stack, case.weights, case.previous).factor
    assert relative_error(turned, step(case)) < 1e-12
    turn = turns[0]
    carried = nystrom_step(case.stack, case.weights, turn @ case.previous).factor
    assert relative_error(carried, turn @ step(case)) < 1e-12


def test_one_client_of_equal_rank_returns_its_gram() -> None:
    case = make_round("random", 1, 2, 3, 20, seed=5)
    factor, client = step(case), case.stack[0]
    assert relative_error(factor.mT @ factor, client.mT @ client) < 1e-12


def test_order_splitting_and_absence_of_clients_do_not_matter() -> None:
    case = make_round("random", 4, 2, 3, 20, seed=6)
    expected = step(case)
    order = torch.tensor([2, 0, 3, 1])
    assert (
        relative_error(
            nystrom_step(case.stack[order], case.weights[order], case.previous).factor, expected
        )
        < 1e-13
    )
    split = torch.cat([case.stack, case.stack[:1]]), torch.cat([case.weights, case.weights[:1]])
    split[1][[0, -1]] /= 2
    assert relative_error(nystrom_step(*split, case.previous).factor, expected) < 1e-13
    padded = torch.cat([case.stack, 1e6 * case.stack[:1]])
    weights = torch.cat([case.weights, torch.zeros(1, dtype=torch.float64)])
    assert relative_error(nystrom_step(padded, weights, case.previous).factor, expected) < 1e-13


def test_drift_identity_of_bures_and_wasserstein() -> None:
    """``||A - A_prev||^2 = d_BW(Q_prev, Q)^2 - tr(Q - A^T A)``."""
    for seed in range(10):
        case = make_round("random", 6, 1, 4, 60, seed)
        factor, before = step(case)[0], case.previous[0]
        q, q_prev = mean_gram(case.stack, case.shares)[0], before.mT @ before
        root = symmetric_root(q_prev, 0.5)
        cross = torch.linalg.eigvalsh(root @ q @ root).clamp(min=0).sqrt().sum()
        distance = q_prev.trace() + q.trace() - 2 * cross
        expected = distance - (q - factor.mT @ factor).trace()
        assert abs((factor - before).square().sum() / expected - 1) < 1e-5


def test_rank_loss_is_zeroed_and_flagged_or_carried_on() -> None:
    case = make_round("random", 4, 2, 3, 20, seed=8)
    previous = case.previous.clone()
    previous[0, 2] = previous[0, 0] + previous[0, 1]
    lost = nystrom_step(case.stack, case.weights, previous)
    assert lost.rank.tolist() == [2, 3]
    assert torch.linalg.svdvals(lost.factor[0])[-1] < 1e-13
    direction = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64) / 3**0.5
    assert (direction @ lost.factor[0]).norm() < 1e-12
    with backend("reference"):
        expected = nystrom_step(case.stack, case.weights, previous, 1e-7)
    assert relative_error(lost.factor, expected.factor) < 1e-9

    orthogonal = case.previous.clone()
    orthogonal[0, 2] = 0
    orthogonal[0, 2, 19] = 5.0
    stack = case.stack.clone()
    stack[:, 0, :, 19] = 0
    orthogonal[0, :2, 19] = 0
    kept = nystrom_step(stack, case.weights, orthogonal, on_rank_loss="keep_prev")
    assert kept.rank.tolist() == [2, 3]
    assert torch.allclose(kept.factor[0, 2], orthogonal[0, 2])
    zeroed = nystrom_step(stack, case.weights, orthogonal)
    assert zeroed.factor[0, 2].norm() < 1e-12
    assert torch.allclose(kept.factor[0, :2], zeroed.factor[0, :2])
    assert torch.equal(kept.factor[1], zeroed.factor[1])


def test_clients_without_overlap_give_zero_and_rank_zero() -> None:
    stack = torch.zeros(2, 1, 2, 8)
    result = nystrom_step(stack, [1, 1], torch.ones(1, 2, 8))
    assert result.rank.tolist() == [0]
    assert not result.factor.any()
    assert result.condition.isinf().all()


def test_without_alignment_the_same_gram_in_its_principal_gauge() -> None:
    case = make_round("random", 4, 2, 3, 20, seed=9)
    aligned, factor = step(case), step(case, align=False)
    assert relative_error(factor.mT @ factor, aligned.mT @ aligned) < 1e-13
    products = factor @ factor.mT
    norms = products.diagonal(dim1=-2, dim2=-1)
    assert relative_error(products, torch.diag_embed(norms)) < 1e-13
    assert (norms[:, :-1] >= norms[:, 1:]).all()
    assert (factor.gather(2, factor.abs().argmax(2, keepdim=True)) > 0).all()


def test_ranks_of_clients_and_server_may_differ() -> None:
    case = make_round("random", 3, 2, 4, 20, seed=10)
    for q in (2, 6):
        previous = torch.randn(2, q, 20, dtype=torch.float64)
        expected = florg.sketched(case.stack, case.shares, previous)
        found = nystrom_step(case.stack, case.weights, previous).factor
        assert relative_error(found, expected) < 1e-10


def test_an_unknown_rank_loss_policy_is_named() -> None:
    case = make_round("random", 2, 1, 2, 5, seed=0)
    with pytest.raises(KernelInputError, match="on_rank_loss is 'keep'; pass 'zero' or"):
        step(case, on_rank_loss="keep")
