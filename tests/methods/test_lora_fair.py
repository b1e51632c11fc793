import json
from itertools import pairwise
from math import inf, isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.experiments.run import start
from fedcore.federation.diagnostics import diagnose
from fedcore.methods import create_method
from tests.experiments.jobs import tiny_recipe
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round
from tests.reference.updates import factors, mean_update, update

SHAPES = ((33, 7), (64, 33), (7, 33), (64, 33))
KINDS = ("random", "near", "identical", "shared_a", "repeated_row", "zero")
LAMS = st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1e3])


def method(**options):
    return create_method("lora_fair", **options)


def dense_definition(cohort, module, lam):
    """``Bbar + C (G + mu I)^+`` and ``Abar`` in fp64, as the equations say."""
    pairs = [factors(cohort.layout, row, module) for row in cohort.updates]
    shares = cohort.shares.tolist()
    b_mean = sum(w * b for w, (b, _) in zip(shares, pairs, strict=True))
    a_mean = sum(w * a for w, (_, a) in zip(shares, pairs, strict=True))
    gram = a_mean @ a_mean.T
    mu = lam * float(gram.trace()) / len(gram)
    excess = sum(w * b @ (a @ a_mean.T) for w, (b, a) in zip(shares, pairs, strict=True))
    ridge = gram + mu * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.pinv(ridge, hermitian=True, rtol=1e-12)
    return b_mean + (excess - b_mean @ gram) @ inverse, a_mean, b_mean, mu


@given(lora_rounds(kinds=KINDS), LAMS)
def test_it_is_the_closed_form(case: LoraRound, lam):
    cohort, layout = case.cohort, case.cohort.layout
    result = method(lam=lam).aggregate(cohort, case.previous)
    assert result.changed == layout
    for module in layout.modules:
        b, a = factors(layout, result.row, module)
        b_expected, a_expected, _, _ = dense_definition(cohort, module, lam)
        torch.testing.assert_close(a, a_expected, rtol=1e-13, atol=1e-13)
        # What the definition itself loses where Abar is ill-conditioned does not count.
        condition = result.steps[module].condition
        allowed = 1e-14 * min(condition, 1e12) * (1 + float(b_expected.norm()))
        if case.kind != "repeated_row" or lam > 0:
            assert float((b - b_expected).norm()) <= 100 * allowed
    head = layout.by_name["head"]
    expected = (cohort.shares[:, None, None] * layout.view(cohort.updates, head)).sum(0)
    torch.testing.assert_close(layout.view(result.row, head), expected)


@given(lora_rounds(kinds=KINDS), LAMS)
def test_the_gradient_of_the_objective_vanishes(case: LoraRound, lam):
    layout = case.cohort.layout
    result = method(lam=lam).aggregate(case.cohort, case.previous)
    for module in layout.modules:
        b, a = factors(layout, result.row, module)
        _, _, b_mean, mu = dense_definition(case.cohort, module, lam)
        target = mean_update(case.cohort, module)
        gradient = mu * (b - b_mean) - (target - b @ a) @ a.T
        size = float((target.norm() + (b @ a).norm()) * a.norm()) + mu * float(b_mean.norm())
        assert float(gradient.norm()) <= 1e-10 * (size or 1.0)


@given(lora_rounds(kinds=KINDS, dtypes=(torch.float64, torch.float32, torch.bfloat16)), LAMS)
def test_the_error_is_never_above_that_of_fedit(case: LoraRound, lam):
    layout = case.cohort.layout
    fair = method(lam=lam).aggregate(case.cohort, case.previous).row
    plain = create_method("fedit").aggregate(case.cohort, case.previous).row
    for module in layout.modules:
        target = mean_update(case.cohort, module)
        ours = float((target - update(layout, fair, module)).norm())
        theirs = float((target - update(layout, plain, module)).norm())
        slack = 1e-12 if case.cohort.updates.dtype == torch.float64 else 1e-6
        b, a = factors(layout, fair, module)
        assert ours <= theirs + slack * float(target.norm() + b.norm() * a.norm())


@given(lora_rounds(kinds=("random", "near", "shared_a", "repeated_row")))
def test_without_a_penalty_the_residual_is_orthogonal_to_the_mean_factor(case: LoraRound):
    layout = case.cohort.layout
    result = method(lam=0.0).aggregate(case.cohort, case.previous)
    for module in layout.modules:
        target = mean_update(case.cohort, module)
        b, a = factors(layout, result.row, module)
        rows = a / a.norm()
        residual = target - b @ a
        assert float((residual @ rows.T).norm()) <= 1e-9 * float(target.norm())
        # And no B for these rows is nearer: what remains is M off the row space of Abar.
        _, values, basis = torch.linalg.svd(a, full_matrices=False)
        basis = basis[values > 1e-6 * values[0]]
        least = float((target - target @ basis.T @ basis).norm())
        assert float(residual.norm()) == pytest.approx(least, abs=1e-9 * float(target.norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_penalty_gives_fedit_at_the_rate_of_one_over_lam(kind):
    case = make_lora_round(kind, [1.0, 2.0, 0.5], SHAPES, 3)
    plain = create_method("fedit").aggregate(case.cohort, case.previous).row
    gaps = [
        float((method(lam=lam).aggregate(case.cohort, case.previous).row - plain).norm())
        for lam in (1e4, 1e6, 1e300)
    ]
    assert gaps[2] <= 1e-12 * float(plain.norm())
    if kind in ("random", "near"):
        assert gaps[0] / gaps[1] == pytest.approx(100, rel=1e-2)


@given(lora_rounds(kinds=("random", "near")))
def test_the_error_grows_with_the_penalty(case: LoraRound):
    layout = case.cohort.layout
    for module in layout.modules:
        target = mean_update(case.cohort, module)
        errors = [
            float((target - update(layout, row, module)).norm())
            for row in (
                method(lam=lam).aggregate(case.cohort, case.previous).row
                for lam in (0.0, 0.01, 0.1, 1.0, 100.0)
            )
        ]
        slack = 1e-12 * float(target.norm())
        assert all(a <= b + slack for a, b in pairwise(errors))


@pytest.mark.parametrize("lam", [0.0, 0.01])
def test_a_singular_mean_factor_is_flagged_and_does_no_harm(lam):
    case = make_lora_round("repeated_row", [1.0, 2.0, 0.5], SHAPES, 3)
    layout = case.cohort.layout
    result = method(lam=lam).aggregate(case.cohort, case.previous)
    assert result.flags == tuple(f"m{j}: the mean A has rank 2 of 3" for j in range(4))
    for module in layout.modules:
        assert result.steps[module].rank == 2
        assert result.steps[module].condition < 1e4
        b, _ = factors(layout, result.row, module)
        expected, _, b_mean, _ = dense_definition(case.cohort, module, lam)
        assert float((b - expected).norm()) < 1e-9 * float(b_mean.norm())


@pytest.mark.parametrize("lam", [0.0, 0.01])
def test_clients_that_cancel_leave_the_mean_b_where_a_says_nothing(lam):
    case = make_lora_round("random", [1.0, 1.0], SHAPES, 3)
    layout = case.cohort.layout
    updates = case.cohort.updates.clone()
    for slot in layout.factor_slots:
        if slot.factor == "A":
            layout.view(updates[1], slot).copy_(-layout.view(updates[0], slot))
    cohort = case.with_updates(updates)
    result = method(lam=lam).aggregate(cohort, case.previous)
    plain = create_method("fedit").aggregate(cohort, case.previous).row
    torch.testing.assert_close(result.row, plain, rtol=1e-13, atol=1e-13)
    assert result.flags[0] == "m0: the mean A has rank 0 of 3"
    assert {step.condition for step in result.steps.values()} == {inf}


@pytest.mark.parametrize("lam", [0.0, 0.01, 5.0])
@pytest.mark.parametrize(("kind", "clients"), [("random", 1), ("identical", 4), ("shared_a", 3)])
def test_clients_of_one_a_are_met_exactly_at_any_penalty(kind, clients, lam):
    case = make_lora_round(kind, [float(n + 1) for n in range(clients)], SHAPES, 3)
    result = method(lam=lam).aggregate(case.cohort, case.previous)
    plain = create_method("fedit").aggregate(case.cohort, case.previous).row
    torch.testing.assert_close(result.row, plain, rtol=1e-12, atol=1e-12)
    for found in diagnose(case.cohort, result, case.previous, "lora"):
        assert found.aggregation_error < 1e-13
        assert found.kept_rank == 3


def test_identical_clients_keep_their_bits():
    for dtype in (torch.float32, torch.bfloat16):
        case = make_lora_round("identical", [1.0, 2.0, 7.0], SHAPES, 3, dtype=dtype)
        row = method().aggregate(case.cohort, case.previous).row
        for slot in case.cohort.layout.factor_slots:
            expected = case.cohort.layout.view(case.cohort.updates[0], slot).float()
            assert torch.equal(case.cohort.layout.view(row, slot), expected)


@given(lora_rounds(kinds=KINDS), LAMS)
def test_the_diagnosis_is_the_dense_error(case: LoraRound, lam):
    result = method(lam=lam).aggregate(case.cohort, case.previous)
    for found in diagnose(case.cohort, result, case.previous, "lora"):
        target = mean_update(case.cohort, found.module)
        gap = target - update(case.cohort.layout, result.row, found.module)
        if case.kind == "zero":
            assert isnan(found.aggregation_error)
        else:
            expected = float(gap.norm() / target.norm())
            assert found.aggregation_error == pytest.approx(expected, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_penalty_is_relative_to_the_mean_factor(factor):
    """``(c B, A / c)`` on all clients leaves the aggregated model as it is."""
    case = make_lora_round("random", [1.0, 2.0, 0.5], SHAPES, 3)
    layout = case.cohort.layout
    scaled = case.cohort.updates.clone()
    for slot in layout.factor_slots:
        layout.view(scaled, slot).mul_(factor if slot.factor == "B" else 1 / factor)
    one = method(lam=0.1).aggregate(case.cohort, case.previous).row
    other = method(lam=0.1).aggregate(case.with_updates(scaled), case.previous).row
    for module in layout.modules:
        torch.testing.assert_close(
            update(layout, one, module), update(layout, other, module), rtol=1e-11, atol=1e-11
        )


def test_zero_uploads_stay_zero():
    case = make_lora_round("zero", [1.0, 2.0], SHAPES, 3)
    for lam in (0.0, 0.01):
        result = method(lam=lam).aggregate(case.cohort, case.previous)
        for slot in case.cohort.layout.factor_slots:
            assert not case.cohort.layout.view(result.row, slot).any()
        assert len(result.flags) == 4


def test_one_round_of_a_run_loses_less_than_fedit(tmp_path):
    """Round 0 has the same uploads under every method that sends both factors."""
    errors = {}
    for name in ("lora_fair", "fedit"):
        settings = {"method.name": name, "rounds": 1, "training.steps": 4, "clients": 3}
        start(tiny_recipe(tmp_path / "home", **settings), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        errors[name] = json.loads(lines[-1])["modules"]
    for ours, theirs in zip(errors["lora_fair"], errors["fedit"], strict=True):
        assert 0 < ours["aggregation_error"] < theirs["aggregation_error"]
        assert ours["kept_rank"] == 2
        assert ours["condition"] > 1
