from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedcore.errors import FedcoreError
from fedcore.federation.records import Traffic
from fedcore.reports.reading import read_run
from tests.reports.fake_run import write_fake_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "run", rounds=6, clients=4, modules=3)


def edit_line(run: Path, number: int, **changes: object) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})
    path.write_text("\n".join(lines) + "\n")


def edit_file(run: Path, name: str, **changes: object) -> None:
    path = run / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_reads_as_written(run: Path):
    record = read_run(run)
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r.index for r in record.rounds] == [-1, 0, 1, 2, 3, 4, 5]
    assert [r.accuracy for r in record.rounds] == [line["accuracy"] for line in written]
    assert record.rounds[0].train_loss is None
    assert (
        record.rounds[3].modules[1].aggregation_error
        == (written[3]["modules"][1]["aggregation_error"])
    )
    assert record.rounds[1].modules[0].aggregation_error is None
    assert record.dropped == {("client-01", "non-finite values"): 1}
    assert record.client_rounds == 6 * 4
    up, down = record.cumulated[5]
    assert (up, down) == (record.summary.bytes_up, record.summary.bytes_down)
    last = written[-1]["clients"]
    gaps = [c["local_accuracy"] - c["global_accuracy"] for c in last]
    assert record.gap == pytest.approx(sum(gaps) / len(gaps), abs=1e-15)
    assert record.not_finite == 0


def test_client_rounds_count_only_the_sampled(run: Path):
    for line in range(2, 8):
        edit_line(run, line, sampled=["client-00", "client-02"])
    assert read_run(run).client_rounds == 12


def test_without_a_list_of_the_sampled_those_that_trained_or_were_dropped_count(run: Path):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("sampled", None)
    lines[1]["clients"][0]["train_loss"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(run).client_rounds == 6 * 4 - 1


def test_nan_and_infinity_are_none_and_counted(run: Path):
    edit_line(run, 3, train_loss=float("nan"), loss=float("inf"))
    record = read_run(run)
    assert (record.rounds[2].train_loss, record.rounds[2].loss) == (None, None)
    assert record.not_finite == 2


def test_an_unfinished_run_is_read_up_to_its_last_whole_line(tmp_path: Path):
    whole = read_run(write_fake_run(tmp_path / "a", rounds=3))
    record = read_run(write_fake_run(tmp_path / "b", rounds=3, finished=False))
    assert record.interrupted_line
    assert not record.summary.finished
    assert record.rounds == whole.rounds
    s, expected = record.summary, whole.summary
    assert (s.recipe, s.method, s.seed) == ("bbc-news", "florg.truncated", 0)
    assert (record.quality, record.best_quality) == (whole.quality, whole.best_quality)
    assert (s.worst_client, s.best_client) == (expected.worst_client, expected.best_client)
    assert s.mean_client == pytest.approx(expected.mean_client)
    assert (s.bytes_up, s.bytes_down) == (expected.bytes_up, expected.bytes_down)
    assert s.seconds == pytest.approx(dict(expected.seconds))


def test_a_summary_that_says_unfinished_gives_names_and_the_rounds_give_numbers(run: Path):
    edit_file(run, "summary.json", finished=False, accuracy=None, rounds=100, method="fedit")
    record = read_run(run)
    assert record.quality == record.rounds[-1].accuracy
    assert (record.summary.method, record.summary.rounds) == ("fedit", 100)


def test_a_run_without_rounds_is_readable(run: Path):
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    record = read_run(run)
    assert (record.rounds, record.quality) == ((), None)
    assert record.summary.bytes_up == Traffic(adapter=0, head=0)


@pytest.mark.parametrize(
    "name", ["recipe.toml", "environment.json", "partition.json", "metrics.jsonl"]
)
def test_a_missing_file_is_named(run: Path, name: str):
    (run / name).unlink()
    with pytest.raises(FedcoreError, match=f"{name} is missing"):
        read_run(run)


def test_a_cut_off_line_in_a_finished_run_is_an_error(run: Path):
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"round": 6, "acc')
    with pytest.raises(FedcoreError, match=r"metrics\.jsonl: the last line is cut off"):
        read_run(run)


def test_half_a_character_at_the_end_is_a_cut_off_line(run: Path):
    (run / "summary.json").unlink()
    with open(run / "metrics.jsonl", "ab") as handle:
        handle.write('{"round": 6, "x": "é'.encode()[:-1])
    assert read_run(run).interrupted_line


def test_a_broken_line_in_the_middle_is_named(run: Path):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-5]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(FedcoreError, match=r"metrics\.jsonl, line 3 is not JSON"):
        read_run(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": "high"}, r"line 3: 'accuracy' is 'high'; it must be a number or null"),
        ({"accuracy": True}, r"line 3: 'accuracy' is True"),
        ({"round": 0}, r"line 3: round 0 follows round 0"),
        ({"round": -2}, r"line 3: 'round' is -2"),
        ({"bytes_up": {"adapter": -1, "head": 0}}, r"line 3, 'bytes_up': 'adapter' is -1"),
        ({"clients": [{"examples": 3}]}, r"line 3, clients\[0\]: field 'client' is missing"),
        ({"modules": {}}, r"line 3: 'modules' is \{\}; it must be a list"),
        ({"seconds": {"train": "x"}}, r"line 3, 'seconds': 'train' is 'x'"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(run: Path, changes: dict, message: str):
    edit_line(run, 3, **changes)
    with pytest.raises(FedcoreError, match=message):
        read_run(run)


def test_a_trained_round_must_have_every_field(run: Path):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    third = json.loads(lines[2])
    del third["bytes_down"]
    lines[2] = json.dumps(third)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(FedcoreError, match="line 3: field 'bytes_down' is missing"):
        read_run(run)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("partition.json", {"class_counts": [[1, 2]]}, "4 rows .* of 5 counts"),
        ("partition.json", {"client_ids": ["a", "a", "b", "c"]}, "all different"),
        ("summary.json", {"finished": "yes"}, "'finished' is 'yes'"),
        ("summary.json", {"method": None}, "'method' is None; it must be a string"),
    ],
)
def test_a_wrong_file_is_named(run: Path, name: str, changes: dict, message: str):
    edit_file(run, name, **changes)
    with pytest.raises(FedcoreError, match=rf"{name}.*{message}"):
        read_run(run)


def test_majority_rate_is_that_of_all_held_out_examples(run: Path):
    edit_file(
        run,
        "partition.json",
        label_names=["x", "y"],
        class_counts=[[1, 1]] * 4,
        test_counts=[[9, 0], [1, 2], [0, 3], [0, 5]],
    )
    parts = read_run(run).partition
    assert parts.majority_rate == 0.5
    assert parts.smallest_test == 3
