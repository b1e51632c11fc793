from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.methods import create_method
from fedcore.methods.robust.base import cohort_gram
from tests.property.faulty_clients import clustered_round, regauged
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round
from tests.reference.updates import update


def whole(cohort, row):
    return torch.cat([update(cohort.layout, row, m).flatten() for m in cohort.layout.modules])


def products(cohort):
    return torch.stack([whole(cohort, row) for row in cohort.updates])


def decide(case, **options):
    cohort, method = case.cohort, create_method("robust_geomedian", **options)
    return method.decide(cohort.client_ids, cohort.weights, cohort_gram(cohort))


def shares(decision):
    return decision.weights / decision.weights.sum()


def weighted(case: LoraRound, weights) -> LoraRound:
    cohort = replace(case.cohort, weights=torch.tensor(weights, dtype=torch.float64))
    return LoraRound(case.kind, cohort, case.previous)


@given(lora_rounds(kinds=("random", "shared_a", "mixed_ranks")), st.integers(0, 100))
def test_the_weighted_mean_is_the_geometric_median(case: LoraRound, seed):
    if not bool((case.cohort.weights > 0).all()) or len(case.cohort) < 3:
        return
    found = decide(case)
    rows, reported = products(case.cohort), case.cohort.shares
    beta = shares(found)
    assert bool((beta > 0).all())
    centre = beta @ rows
    gaps = (rows - centre).norm(dim=1)
    best = float(reported @ gaps)
    # The sum of distances is convex: no step away may lower it.
    random = torch.Generator().manual_seed(seed)
    size = float(rows.norm(dim=1).median())
    for length in (1e-3, 0.1, 1.0):
        for n in range(len(rows)):
            step = torch.randn(rows.shape[1], generator=random, dtype=torch.float64)
            for direction in (step / step.norm() * size, rows[n] - centre):
                moved = centre + length * direction
                assert float(reported @ (rows - moved).norm(dim=1)) >= best - 1e-5 * size


def test_one_dimension_gives_the_weighted_median():
    case = make_lora_round("random", [1.0] * 5, ((4, 4),), 1)
    layout, updates = case.cohort.layout, torch.zeros_like(case.cohort.updates)
    for n, value in enumerate((1.0, 2.0, 3.0, 50.0, 1e6)):
        layout.view(updates[n], layout.by_name["m0.A"])[0, 0] = value
        layout.view(updates[n], layout.by_name["m0.B"])[0, 0] = 1.0
    for weights, expected in (
        ([1.0] * 5, 3.0),
        ([9.0, 1, 1, 1, 1], 1.0),
        ([1.0, 1, 1, 9, 1], 50.0),
    ):
        line = LoraRound(case.kind, case.with_updates(updates), case.previous)
        found = decide(weighted(line, weights))
        centre = shares(found) @ products(line.cohort)
        assert float(centre.norm()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [-1.0, -1e3, 1e6, 1e12])
def test_a_faulty_minority_moves_the_model_by_little_however_far_it_is(scale):
    case = clustered_round(9, [1, 4, 7], scale=scale)
    honest = products(case.cohort)[[0, 2, 3, 5, 6, 8]]
    found = decide(case)
    centre = shares(found) @ products(case.cohort)
    radius = float((honest - honest.mean(0)).norm(dim=1).max())
    assert float((centre - honest.mean(0)).norm()) < 3 * radius
    names = [flag.split(":")[0] for flag in found.flags if "counts" in flag]
    assert {"c001", "c004", "c007"} <= set(names)
    assert all("not converged" not in flag for flag in found.flags)


def test_clients_at_equal_distances_keep_equal_weights():
    case = make_lora_round("random", [1.0] * 4, ((4, 4),), 1)
    layout, updates = case.cohort.layout, torch.zeros_like(case.cohort.updates)
    for n in range(4):
        layout.view(updates[n], layout.by_name["m0.A"])[0, n] = 0.1
        layout.view(updates[n], layout.by_name["m0.B"])[0, n] = 10.0
    even = LoraRound(case.kind, regauged(case.with_updates(updates), 3), case.previous)
    found = decide(even)
    torch.testing.assert_close(shares(found), torch.full((4,), 0.25).double())
    assert found.flags == ()
    same = make_lora_round("identical", [1.0, 2.0, 5.0], ((33, 7),), 3)
    found = decide(LoraRound("", regauged(same.cohort, 1), same.previous))
    torch.testing.assert_close(shares(found), same.cohort.shares)
    assert found.flags == ()


def test_zero_clients_keep_their_weights():
    case = make_lora_round("zero", [1.0, 2.0, 5.0], ((33, 7),), 3)
    found = decide(case)
    assert torch.equal(found.weights, case.cohort.weights)
    assert found.flags == ()


def test_a_flag_says_what_a_client_counts():
    case = clustered_round(5, [2], weights=[1.0, 1.0, 4.0, 1.0, 1.0], scale=100.0)
    found = decide(case, weight_cap=1.0)
    result = create_method("robust_geomedian", weight_cap=1.0).aggregate(case.cohort, case.previous)
    assert result.flags[0] == "c002: its weight 4 counts as 1"
    capped = weighted(case, [1.0] * 5)
    share = float(shares(decide(capped))[2])
    assert f"c002: counts {share:.3g} in place of 0.2" in result.flags
    assert share < 1e-3
    assert bool(found.kept.all())
    assert found.scales is None


def test_weights_that_have_not_converged_are_used_and_flagged():
    case = make_lora_round("random", [1.0, 2.0, 5.0, 1.0], ((33, 7),), 3)
    found = decide(case, sweeps=1)
    assert found.flags[-1] == "the weights have not converged after 1 sweeps"
    rows = products(case.cohort)
    gaps = (rows - case.cohort.shares @ rows).norm(dim=1)
    expected = case.cohort.shares / gaps
    torch.testing.assert_close(shares(found), expected / expected.sum())


def test_the_smoothing_is_relative_to_the_median_norm():
    case = make_lora_round("random", [1.0] * 4, ((33, 7),), 3)
    large = decide(case, smoothing=1e3)
    torch.testing.assert_close(shares(large), case.cohort.shares)
    one = shares(decide(case, smoothing=0.5))
    layout, updates = case.cohort.layout, case.cohort.updates.clone()
    layout.view(updates, layout.by_name["m0.B"]).mul_(1e-4)
    scaled = LoraRound("", case.with_updates(updates), case.previous)
    torch.testing.assert_close(shares(decide(scaled, smoothing=0.5)), one)
