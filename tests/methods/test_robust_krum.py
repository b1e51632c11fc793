from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.experiments.run import start
from fedcore.methods import create_method
from tests.experiments.jobs import tiny_recipe
from tests.property.faulty_clients import clustered_round
from tests.property.lora_rounds import make_lora_round, pick
from tests.reference.updates import update


def whole(cohort, row):
    return torch.cat([update(cohort.layout, row, m).flatten() for m in cohort.layout.modules])


def left_out(result):
    return [flag.split(":")[0] for flag in result.flags if "left out" in flag]


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**31), st.sampled_from((-1.0, 50.0)))
def test_faulty_clients_are_never_kept(faulty, more, seed, scale):
    """f clients in agreement among 2 f + 3 or more."""
    clients = 2 * faulty + 3 + more
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed)).tolist()
    bad = sorted(order[:faulty])
    case = clustered_round(clients, bad, seed=seed, scale=scale)
    for keep in (None, 1):
        method = create_method("robust_krum", faulty=faulty, keep=keep)
        result = method.aggregate(case.cohort, case.previous)
        gone = left_out(result)
        assert {f"c{n:03d}" for n in bad} <= set(gone)
        assert len(gone) == (faulty if keep is None else clients - 1)


def test_scores_are_those_of_the_dense_distances():
    case = make_lora_round("random", [1.0] * 9, ((33, 7), (7, 33)), 3, seed=4)
    rows = torch.stack([whole(case.cohort, row) for row in case.cohort.updates])
    squares = torch.cdist(rows, rows).square()
    for faulty in (0, 1, 3):
        scores = [
            sum(sorted(float(squares[i, j]) for j in range(9) if j != i)[: 9 - faulty - 2])
            for i in range(9)
        ]
        order = sorted(range(9), key=lambda i: scores[i])
        for keep in (1, 2, 9 - faulty):
            method = create_method("robust_krum", faulty=faulty, keep=keep)
            result = method.aggregate(case.cohort, case.previous)
            assert left_out(result) == [f"c{i:03d}" for i in sorted(order[keep:])]
            kept = pick(case.cohort, sorted(order[:keep]))
            expected = create_method("product_svd").aggregate(kept, case.previous).row
            assert torch.equal(result.row, expected)
            if keep == 9 - faulty and faulty:
                last = max(order[:keep], key=lambda i: scores[i])
                n = min(order[keep:])
                assert result.flags[0] == (
                    f"c{n:03d}: left out, its score {scores[n]:.3g} is not among the {keep} "
                    f"lowest, up to {scores[last]:.3g}"
                )


def test_ties_go_to_the_lower_id():
    case = make_lora_round("identical", [1.0] * 7, ((33, 7), (7, 33)), 3)
    result = create_method("robust_krum", faulty=2, keep=3).aggregate(case.cohort, case.previous)
    assert left_out(result) == ["c003", "c004", "c005", "c006"]


def test_those_kept_share_by_their_weights():
    weights = [2.0, 3.0, 1.0, 4.0, 8.0, 1.0]
    case = clustered_round(6, [4], weights=weights)
    result = create_method("robust_krum", host="fedit").aggregate(case.cohort, case.previous)
    kept = [0, 1, 2, 3, 5]
    total = sum(weights[n] for n in kept)
    expected = sum(weights[n] / total * case.cohort.updates[n] for n in kept)
    torch.testing.assert_close(result.row, expected, rtol=1e-12, atol=1e-12)
    assert left_out(result) == ["c004"]


def test_reported_weights_have_no_say_in_who_is_kept():
    one = clustered_round(7, [2], weights=[1.0] * 7)
    other = clustered_round(7, [2], weights=[1.0, 1.0, 1e9, 1.0, 1.0, 1.0, 1.0])
    method = create_method("robust_krum", faulty=2)
    assert left_out(method.aggregate(one.cohort, one.previous)) == left_out(
        method.aggregate(other.cohort, other.previous)
    )


def test_a_client_in_two_halves_has_a_neighbour_more():
    """The exemption of this rule: splitting changes who is kept."""
    case = clustered_round(5, [1])
    method = create_method("robust_krum")
    assert left_out(method.aggregate(case.cohort, case.previous)) == ["c001"]
    halves = pick(case.cohort, [0, 1, 1, 1, 2, 3, 4], [1.0, 0.3, 0.3, 0.4, 1.0, 1.0, 1.0])
    gone = left_out(method.aggregate(halves, case.previous))
    assert len(gone) == 1
    # Three copies: with one of them out, two stay.
    safe = create_method("robust_krum", faulty=2)
    assert len(left_out(safe.aggregate(halves, case.previous))) == 2


@pytest.mark.parametrize(("faulty", "clients"), [(0, 2), (1, 4), (2, 6), (3, 8)])
def test_too_few_clients_are_refused(faulty, clients):
    method = create_method("robust_krum", faulty=faulty)
    case = clustered_round(clients)
    least = 2 * faulty + 3
    message = f"round 1: robust_krum with faulty = {faulty} needs {least} clients or more, .*"
    with pytest.raises(FedcoreError, match=message + f"has {clients}$"):
        method.aggregate(case.cohort, case.previous)
    enough = clustered_round(least)
    assert method.aggregate(enough.cohort, enough.previous).row.isfinite().all()


def test_more_than_the_honest_cannot_be_kept():
    case = clustered_round(5)
    with pytest.raises(FedcoreError, match=r"cannot keep 5 of 5 clients, 1 of which may be faulty"):
        create_method("robust_krum", keep=5).aggregate(case.cohort, case.previous)


def test_one_round_of_a_run_leaves_out_one_of_five(tmp_path):
    settings = {"method.name": "robust_krum", "rounds": 1, "training.steps": 4, "clients": 5}
    start(tiny_recipe(tmp_path / "home", **settings), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(record["flags"]) == 1
    assert ": left out, its score " in record["flags"][0]
    assert len(record["sampled"]) == 5
