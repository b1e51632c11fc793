from __future__ import annotations

from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.methods import create_method
from tests.property.faulty_clients import clustered_round, regauged
from tests.property.lora_rounds import make_lora_round, pick
from tests.reference.updates import update


def whole(cohort, row):
    return torch.cat([update(cohort.layout, row, m).flatten() for m in cohort.layout.modules])


def left_out(result):
    return [flag.split(":")[0] for flag in result.flags if "left out" in flag]


@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2**31), st.sampled_from((-1.0, 50.0)))
def test_a_faulty_minority_is_left_out(faulty, more, seed, scale):
    clients = 2 * faulty + 3 + more
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed)).tolist()
    bad = sorted(order[:faulty])
    case = clustered_round(clients, bad, seed=seed, scale=scale)
    result = create_method("robust_median", cutoff=10.0).aggregate(case.cohort, case.previous)
    left = left_out(result)
    assert {f"c{n:03d}" for n in bad} <= set(left)
    # The deviation of few distances may be small by chance, and then more than those.
    assert len(left) <= (clients - 1) // 2


def test_a_small_spread_by_chance_leaves_out_honest_clients_too():
    order = torch.randperm(8, generator=torch.Generator().manual_seed(200_000)).tolist()
    case = clustered_round(8, order[:1], seed=200_000, scale=-1.0)
    result = create_method("robust_median", cutoff=10.0).aggregate(case.cohort, case.previous)
    assert left_out(result) == ["c001", "c005", "c006"]
    assert order[:1] == [1]


@pytest.mark.parametrize("cutoff", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_that_of_the_dense_distances(cutoff, seed):
    case = make_lora_round("random", [1.0, 2.0] * 4, ((33, 7), (7, 33)), 3, seed=seed)
    rows = [whole(case.cohort, row) for row in case.cohort.updates]
    gaps = [[float((a - b).norm()) for b in rows] for a in rows]
    others = [[g for j, g in enumerate(row) if j != i] for i, row in enumerate(gaps)]
    centre = min(range(8), key=lambda i: median(others[i]))
    middle = median(others[centre])
    spread = median([abs(g - middle) for g in others[centre]])
    bad = [n for n in range(8) if gaps[centre][n] > middle + cutoff * spread]
    result = create_method("robust_median", cutoff=cutoff).aggregate(case.cohort, case.previous)
    assert left_out(result) == [f"c{n:03d}" for n in bad]
    assert cutoff > 0.5 or bad
    kept = [n for n in range(8) if n not in bad]
    expected = create_method("product_svd").aggregate(
        pick(case.cohort, kept, [[1.0, 2.0][n % 2] for n in kept]), case.previous
    )
    assert torch.equal(result.row, expected.row)
    for flag, n in zip(result.flags, bad, strict=False):
        assert flag == (
            f"c{n:03d}: left out, {gaps[centre][n]:.3g} from the most central client "
            f"c{centre:03d}, more than {middle + cutoff * spread:.3g}"
        )


def test_no_one_is_left_out_where_no_one_stands_out():
    """Equal distances differ by rounding, which is no reason."""
    case = make_lora_round("random", [1.0] * 4, ((4, 4),), 1)
    layout, updates = case.cohort.layout, torch.zeros_like(case.cohort.updates)
    for n in range(4):
        # e_n e_n^T: six equal distances.
        layout.view(updates[n], layout.by_name["m0.A"])[0, n] = 0.1
        layout.view(updates[n], layout.by_name["m0.B"])[0, n] = 10.0
    for seed in range(20):
        cohort = regauged(case.with_updates(updates), seed)
        assert left_out(create_method("robust_median").aggregate(cohort, case.previous)) == []
    same = make_lora_round("identical", [1.0] * 5, ((33, 7),), 3)
    cohort = regauged(same.cohort, 1)
    assert left_out(create_method("robust_median").aggregate(cohort, same.previous)) == []


def test_three_clients_all_stay_and_weights_have_no_vote():
    for seed in range(10):
        case = make_lora_round("random", [1.0] * 3, ((33, 7),), 3, seed=seed)
        assert left_out(create_method("robust_median").aggregate(case.cohort, case.previous)) == []
    one = clustered_round(7, [2], weights=[1.0] * 7)
    other = clustered_round(7, [2], weights=[1.0, 1.0, 1e9, 1.0, 1.0, 1.0, 1.0])
    for case in (one, other):
        result = create_method("robust_median").aggregate(case.cohort, case.previous)
        assert "c002" in left_out(result)


def test_those_kept_share_by_their_weights():
    weights = [2.0, 3.0, 1.0, 4.0, 8.0, 1.0]
    case = clustered_round(6, [4], weights=weights)
    method = create_method("robust_median", host="fedit", cutoff=100.0)
    result = method.aggregate(case.cohort, case.previous)
    kept = [0, 1, 2, 3, 5]
    total = sum(weights[n] for n in kept)
    expected = sum(weights[n] / total * case.cohort.updates[n] for n in kept)
    torch.testing.assert_close(result.row, expected, rtol=1e-12, atol=1e-12)
    assert left_out(result) == ["c004"]
