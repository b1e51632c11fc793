import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.federation.diagnostics import diagnose
from fedcore.methods import Broadcast, create_method
from tests.property.adapters import gram_state

MODULES = ("layer.0.query", "layer.0.value")
VARIANTS = ("florg.truncated", "florg.sketched")


def gram_cohort(weights, *, rank=3, width=12, seed=0, noise=None):
    """Clients around a common previous factor, in fp64; far from it when ``noise`` is None."""
    shared = gram_state(seed + 1000, rank, width)
    layout = shared.layout()
    previous = Broadcast(layout, shared.to_row(layout).double())
    states = {f"c{n:03d}": gram_state(seed + n, rank, width) for n in range(len(weights))}
    cohort = Cohort.from_states(states, dict(zip(states, weights, strict=True)))
    updates = cohort.updates.double()
    if noise is not None:
        updates = previous.row + noise * updates
    return Cohort(**{**cohort.__dict__, "updates": updates}), previous


def factor(layout, row, module):
    return layout.view(row, layout.by_name[f"{module}.A"])


def mean_gram(cohort, module):
    return sum(
        share * factor(cohort.layout, row, module).T @ factor(cohort.layout, row, module)
        for share, row in zip(cohort.shares.tolist(), cohort.updates, strict=True)
    )


WEIGHTS = st.lists(st.floats(0.05, 100.0), min_size=1, max_size=5)


@given(WEIGHTS)
def test_truncated_is_the_best_gram_of_its_rank_and_the_nearest_factor(weights):
    cohort, previous = gram_cohort(weights)
    result = create_method("florg").aggregate(cohort, previous)
    for module in MODULES:
        target = mean_gram(cohort, module)
        got = factor(cohort.layout, result.row, module)
        eigenvalues = torch.linalg.eigvalsh(target).flip(0)
        tail = eigenvalues[3:].square().sum().sqrt()
        error = (target - got.T @ got).norm()
        torch.testing.assert_close(error, tail, rtol=1e-9, atol=1e-9 * float(target.norm()))
        cross = got @ factor(previous.layout, previous.row, module).T
        torch.testing.assert_close(cross, cross.T, rtol=0, atol=1e-9 * float(cross.norm()))
        assert float(torch.linalg.eigvalsh(cross).min()) > -1e-9 * float(cross.norm())


@given(WEIGHTS)
def test_sketched_is_the_nystrom_approximation_and_never_gains_energy(weights):
    cohort, previous = gram_cohort(weights)
    result = create_method("florg.sketched").aggregate(cohort, previous)
    for module in MODULES:
        target = mean_gram(cohort, module)
        start = factor(previous.layout, previous.row, module)
        core = torch.linalg.inv(start @ target @ start.T)
        expected = target @ start.T @ core @ start @ target
        got = factor(cohort.layout, result.row, module)
        scale = float(target.norm())
        torch.testing.assert_close(got.T @ got, expected, rtol=0, atol=1e-8 * scale)
        lost = torch.linalg.eigvalsh(target - got.T @ got)
        assert float(lost.min()) > -1e-9 * scale


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("align", [True, False])
def test_per_client_rotations_change_nothing(name, align):
    method = create_method(name, align=align)
    cohort, previous = gram_cohort([1.0, 2.0, 3.0], noise=0.3)
    turned = cohort.updates.clone()
    generator = torch.Generator().manual_seed(0)
    for n in range(3):
        for module in MODULES:
            view = factor(cohort.layout, turned[n], module)
            turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
            view.copy_(turn @ view)
    one = method.aggregate(cohort, previous).row
    other = method.aggregate(Cohort(**{**cohort.__dict__, "updates": turned}), previous).row
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_turning_the_previous_factor_turns_the_result(name):
    method = create_method(name)
    cohort, previous = gram_cohort([1.0, 2.0], noise=0.3)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    moved = previous.row.clone()
    for module in MODULES:
        view = factor(previous.layout, moved, module)
        view.copy_(turn @ view)
    one = method.aggregate(cohort, previous).row
    other = method.aggregate(cohort, Broadcast(previous.layout, moved)).row
    for module in MODULES:
        expected = turn @ factor(previous.layout, one, module)
        torch.testing.assert_close(factor(previous.layout, other, module), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_alignment_changes_the_gauge_and_not_the_model(name):
    cohort, previous = gram_cohort([1.0, 2.0, 0.5], noise=0.2)
    aligned = create_method(name).aggregate(cohort, previous).row
    plain = create_method(name, align=False).aggregate(cohort, previous).row
    for module in MODULES:
        one, other = (factor(cohort.layout, row, module) for row in (aligned, plain))
        torch.testing.assert_close(one.T @ one, other.T @ other)
        start = factor(previous.layout, previous.row, module)
        assert (one - start).norm() < (other - start).norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_low_rank_uploads_are_aggregated_exactly(name):
    cohort, previous = gram_cohort([2.0])
    equal = Cohort(
        **{
            **cohort.__dict__,
            "updates": cohort.updates.expand(4, -1).clone(),
            "weights": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
            "client_ids": ("a", "b", "c", "d"),
        }
    )
    for one in (cohort, equal):
        found = create_method(name).aggregate(one, previous)
        for diagnosis in diagnose(one, found, previous, "gram"):
            assert diagnosis.aggregation_error < 1e-7
            assert diagnosis.kept_rank == 3


def test_mixed_ranks_are_padded_and_exact_where_the_rank_suffices():
    states = {"a": gram_state(0, rank=1), "b": gram_state(1, rank=2)}
    layout = gram_state(9, rank=3).layout()
    cohort = Cohort.from_states(states, layout=layout)
    previous = Broadcast(layout, gram_state(9, rank=3).to_row(layout))
    for name in VARIANTS:
        result = create_method(name).aggregate(cohort, previous)
        for module in MODULES:
            got = factor(layout, result.row, module)
            torch.testing.assert_close(
                got.T @ got, mean_gram(cohort, module).float(), rtol=1e-3, atol=1e-4
            )


def test_lost_rank_is_flagged_and_its_rows_are_zero():
    cohort, previous = gram_cohort([1.0, 1.0], rank=3)
    poor = cohort.updates.clone()
    for n in range(2):
        for module in MODULES:
            factor(cohort.layout, poor[n], module)[1:] = 0
    poor[1] = poor[0]
    cohort = Cohort(**{**cohort.__dict__, "updates": poor})
    result = create_method("florg.truncated").aggregate(cohort, previous)
    assert any("rank 1 of 3 kept" in flag for flag in result.flags)
    for module in MODULES:
        got = factor(cohort.layout, result.row, module)
        assert int(torch.linalg.matrix_rank(got)) == 1
        torch.testing.assert_close(got.T @ got, mean_gram(cohort, module))


def test_a_zero_previous_factor_is_refused():
    cohort, previous = gram_cohort([1.0])
    zero = previous.row.clone()
    factor(previous.layout, zero, MODULES[1]).zero_()
    with pytest.raises(FedcoreError, match=r"layer\.0\.value\.A of the previous state is zero"):
        create_method("florg").aggregate(cohort, Broadcast(previous.layout, zero))


def test_avg_a_misses_the_covariance_of_the_factor():
    cohort, previous = gram_cohort([1.0, 3.0])
    result = create_method("florg.avg_a").aggregate(cohort, previous)
    for module in MODULES:
        got = factor(cohort.layout, result.row, module)
        shares = cohort.shares.tolist()
        covariance = sum(
            w
            * (factor(cohort.layout, u, module) - got).T
            @ (factor(cohort.layout, u, module) - got)
            for w, u in zip(shares, cohort.updates, strict=True)
        )
        torch.testing.assert_close(mean_gram(cohort, module), got.T @ got + covariance)


def test_variants_differ_at_third_order():
    gaps = []
    for step in (0.1, 0.01):
        cohort, previous = gram_cohort([1.0, 2.0, 3.0, 1.0], width=40, noise=step)
        grams = []
        for name in VARIANTS:
            row = create_method(name).aggregate(cohort, previous).row
            got = factor(cohort.layout, row, MODULES[0])
            grams.append(got.T @ got)
        gaps.append(float((grams[0] - grams[1]).norm()))
    slope = math.log10(gaps[0] / gaps[1])
    assert slope == pytest.approx(3.0, abs=0.2)


def test_the_offset_makes_errors_relative_to_the_update():
    cohort, previous = gram_cohort([1.0, 2.0], noise=0.1)
    result = create_method("florg.avg_a").aggregate(cohort, previous)
    offset = {m: factor(previous.layout, previous.row, m) for m in MODULES}
    plain = diagnose(cohort, result, previous, "gram")
    relative = diagnose(cohort, result, previous, "gram", offset)
    for one, other in zip(plain, relative, strict=True):
        update = mean_gram(cohort, one.module) - offset[one.module].T @ offset[one.module]
        ratio = float(mean_gram(cohort, one.module).norm() / update.norm())
        assert other.aggregation_error == pytest.approx(one.aggregation_error * ratio, rel=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("align", [True, False])
@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=2), seed=st.integers(0, 50))
def test_a_lower_rank_is_the_best_of_its_rank_and_the_nearest_factor(name, align, ranks, seed):
    cohort, previous = gram_cohort([1.0, 2.0], rank=4, seed=seed)
    method = create_method(name, align=align)
    result = method.aggregate(cohort, previous)
    before = result.row.clone()
    row = method.for_client(Broadcast(cohort.layout, result.row), previous, ranks)
    assert torch.equal(result.row, before)
    for module, rank in zip(MODULES, ranks, strict=True):
        whole = factor(cohort.layout, result.row, module)
        own = factor(cohort.layout, row, module)
        assert not bool(own[rank:].any())
        tail = torch.linalg.eigvalsh(whole @ whole.T).flip(0)[rank:].square().sum().sqrt()
        error = (whole.T @ whole - own.T @ own).norm()
        torch.testing.assert_close(error, tail, rtol=1e-7, atol=1e-9)
        if align:
            # A A_prev^T is positive semi-definite: no turn brings the factor nearer.
            turn = own[:rank] @ factor(cohort.layout, previous.row, module)[:rank].T
            torch.testing.assert_close(turn, turn.T, rtol=1e-7, atol=1e-9)
            assert torch.linalg.eigvalsh((turn + turn.T) / 2).min() > -1e-9
    same = method.for_client(Broadcast(cohort.layout, result.row), previous, [4, 4])
    assert torch.equal(same, result.row)
