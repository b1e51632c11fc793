from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from fedcore.errors import FedcoreError
from fedcore.reports.comparison import comparison_rows, group_runs
from fedcore.reports.intervals import estimate, median_until
from fedcore.reports.notes import comparison_notes, run_notes, run_outcome
from fedcore.reports.reading import read_run
from fedcore.reports.record import RunRecord
from tests.reports.fake_run import write_fake_run

T_975 = {1: 12.706204736, 2: 4.302652730, 4: 2.776445105}
"""Quantiles of Student's t by degrees of freedom, from printed tables."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    root = tmp_path_factory.mktemp("runs")
    return [
        read_run(
            write_fake_run(
                root / f"{method}-{seed}", method=method, seed=seed, rounds=8, clients=4, modules=3
            )
        )
        for method in ("fedit", "florg.truncated", "head_only")
        for seed in range(3)
    ]


def finish(record: RunRecord, **changes: object) -> RunRecord:
    return replace(record, summary=record.summary.model_copy(update=changes))


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.8, 0.9, 0.85], [1.0, 2.0, 4.0, 8.0, 16.0]])
def test_interval_is_student_t_by_hand(values: list[float]):
    n = len(values)
    mean = sum(values) / n
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    found = estimate(values)
    half = T_975[n - 1] * deviation / sqrt(n)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.half_width == pytest.approx(half, rel=1e-8)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-8)


def test_one_run_has_no_interval_and_equal_runs_have_a_zero_one():
    assert (estimate([0.5]).half_width, estimate([0.5]).low) == (None, None)
    assert estimate([0.5, 0.5]).half_width == 0.0
    assert estimate([None, 0.5, None]) == estimate([0.5])
    assert estimate([]).mean is None


def test_an_interval_is_not_cut_off_at_one():
    assert estimate([0.9, 1.0]).high == pytest.approx(0.95 + T_975[1] * 0.05)


def test_rounds_to_target_of_runs_that_never_reach_it_count_as_infinite():
    assert median_until([3, 5, None]) == 5
    assert median_until([3, None, None]) is None
    assert median_until([3, 5]) == 4
    assert median_until([3, None]) is None
    assert median_until([]) is None


def test_rows_are_flat_means_over_seeds(records: list[RunRecord]):
    rows = comparison_rows(records)
    assert [row["method"] for row in rows] == ["fedit", "florg.truncated", "head_only"]
    assert json.loads(json.dumps(rows)) == rows
    for row, runs in zip(rows, (records[:3], records[3:6], records[6:]), strict=True):
        values = [run.quality for run in runs]
        mean = sum(values) / 3
        half = T_975[2] * sqrt(sum((v - mean) ** 2 for v in values) / 2) / sqrt(3)
        assert row["accuracy_mean"] == pytest.approx(mean)
        assert row["accuracy_low"] == pytest.approx(mean - half, rel=1e-7)
        assert row["accuracy_high"] == pytest.approx(mean + half, rel=1e-7)
        assert row["worst_client_mean"] == pytest.approx(
            sum(run.summary.worst_client for run in runs) / 3
        )
        assert row["gap_mean"] == pytest.approx(sum(run.gap for run in runs) / 3)
        assert (row["runs"], row["seeds"]) == (3, "0, 1, 2")
        assert row["seconds"] == pytest.approx(8 * 3.87)
        assert row["aggregate_seconds"] == pytest.approx(8 * 0.02)


def test_adapter_and_head_traffic_stay_apart(records: list[RunRecord]):
    fedit, florg, head = comparison_rows(records)
    each, head_bytes = 3 * 8 * 384 * 4 * 2, 5 * 385 * 4
    # One of 8 x 4 uploads was dropped before it was sent; every client got its broadcast.
    assert fedit["adapter_mb_down"] == pytest.approx(32 * each / 1e6)
    assert fedit["adapter_mb_up"] == pytest.approx(31 * each / 1e6)
    assert fedit["adapter_mb_down_per_client_round"] == pytest.approx(each / 1e6)
    assert fedit["head_mb_down_per_client_round"] == pytest.approx(head_bytes / 1e6)
    assert florg["adapter_mb_up"] == pytest.approx(fedit["adapter_mb_up"] / 2)
    assert (head["adapter_mb_up"], head["adapter_mb_down"]) == (0.0, 0.0)
    assert head["head_mb_up"] == fedit["head_mb_up"]
    assert head["aggregation_error"] is None


def test_a_single_seed_gives_null_and_never_zero(records: list[RunRecord]):
    (row,) = comparison_rows(records[:1])
    for name in ("accuracy", "worst_client", "gap"):
        assert row[f"{name}_mean"] is not None
        assert {row[f"{name}_{end}"] for end in ("low", "high", "half_width")} == {None}
    assert "A single run, hence no interval: fedit." in comparison_notes(group_runs(records[:1]))


def test_varied_settings_make_groups_of_their_own(records: list[RunRecord]):
    varied = [{"adapter.rank": 4}, {"adapter.rank": 8}, {"adapter.rank": 8}]
    rows = comparison_rows(records[:3], varied)
    assert [(row["adapter.rank"], row["runs"]) for row in rows] == [(4, 1), (8, 2)]
    assert list(rows[0])[:3] == ["method", "adapter.rank", "runs"]
    assert [g.label for g in group_runs(records[:3], varied)] == [
        "fedit · rank 4",
        "fedit · rank 8",
    ]


def test_unfinished_runs_are_counted_and_left_out(records: list[RunRecord]):
    waiting = finish(records[2], finished=False, accuracy=0.0)
    (row,) = comparison_rows([*records[:2], waiting])
    assert (row["runs"], row["unfinished"], row["seeds"]) == (2, 1, "0, 1")
    assert row["accuracy_mean"] == pytest.approx((records[0].quality + records[1].quality) / 2)
    (alone,) = comparison_rows([waiting])
    assert (alone["runs"], alone["accuracy_mean"], alone["adapter_mb_up"]) == (0, None, None)
    assert alone["below_majority"] is False


def test_rounds_to_target_needs_one_target(records: list[RunRecord]):
    runs = [finish(r, rounds_to_target=n) for r, n in zip(records[:3], (4, None, 6), strict=True)]
    (row,) = comparison_rows(runs)
    assert (row["rounds_to_target"], row["target_reached"]) == (6, 2)
    other = [runs[0], finish(runs[1], target_accuracy=0.5)]
    (row,) = comparison_rows(other)
    assert (row["rounds_to_target"], row["target_reached"], row["target_accuracy"]) == (
        None,
        None,
        None,
    )


def test_no_better_than_the_majority_is_marked(records: list[RunRecord]):
    majority = records[0].partition.majority_rate
    failed = finish(records[0], accuracy=majority)
    assert comparison_rows([failed])[0]["below_majority"] is True
    assert comparison_rows([finish(failed, accuracy=majority + 1e-9)])[0]["below_majority"] is False
    assert any(note.startswith("Failed") for note in run_notes(failed))


def test_the_same_seed_twice_is_not_two_runs(records: list[RunRecord]):
    with pytest.raises(FedcoreError, match="are both fedit with seed 0"):
        comparison_rows([records[0], records[0]])


def test_wrong_arguments_are_named(records: list[RunRecord]):
    with pytest.raises(FedcoreError, match="records is empty"):
        comparison_rows([])
    with pytest.raises(FedcoreError, match="varied has 1 mappings for 2 records"):
        comparison_rows(records[:2], [{}])
    with pytest.raises(FedcoreError, match="varied keys"):
        comparison_rows(records[:2], [{"a": 1}, {"b": 1}])


def test_notes_tell_what_a_reader_must_know(tmp_path: Path):
    run = read_run(write_fake_run(tmp_path / "run", rounds=5, clients=4, finished=False))
    text = " ".join(run_notes(run))
    assert "not finished: every number is as of 5 rounds" in text
    assert "cut off" in text
    assert "1 upload was left out of the aggregate: client-01 (non-finite values)." in text
    assert "One run, seed 0" in text
    assert f"{run.partition.smallest_test} examples" in text
    assert run_outcome(run).startswith("After 5 rounds with 4 clients, held-out accuracy is 0.")
    unmeasured = run.rounds[-1].model_copy(update={"accuracy": None})
    late = replace(run, rounds=(*run.rounds[:-1], unmeasured))
    assert "(last measured after round 4)" in run_outcome(late)
    cut = replace(run, rounds=run.rounds[:-2])
    assert "as of 3 of 5 planned rounds" in " ".join(run_notes(cut))
