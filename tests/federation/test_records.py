"""What a run writes is one definition: read, it is what was written, to the byte."""

import json
from pathlib import Path
from shutil import copytree

import pytest

from fedcore.errors import FedcoreError
from fedcore.federation.measures import ACCURACY, PERPLEXITY
from fedcore.federation.outcome import outcome
from fedcore.federation.record_files import parse_json, read_record, validated
from fedcore.federation.records import (
    ClientRound,
    DroppedClient,
    Environment,
    ModuleRound,
    PartitionRecord,
    PrivacySpent,
    Round,
    Sample,
    Summary,
    Traffic,
)
from fedcore.reports.page import write_run_page
from fedcore.reports.reading import read_run

RECORDED = Path(__file__).resolve().parents[1] / "reports" / "recorded"
"""Run folders that were written before there were these models."""

FILES = {
    "environment.json": Environment,
    "partition.json": PartitionRecord,
    "summary.json": Summary,
    "sample.json": Sample,
}

NOTHING = {"adapter": 0, "head": 0}

TRAINED = {
    "round": 0,
    "accuracy": 0.5,
    "loss": 1.0,
    "train_loss": None,
    "clients": [],
    "dropped": [],
    "bytes_up": NOTHING,
    "bytes_down": NOTHING,
    "modules": [],
}


@pytest.mark.parametrize("name", ["classifier", "language-model"])
def test_recorded_runs_are_written_as_they_were_read(name):
    for line in (RECORDED / name / "metrics.jsonl").read_text().splitlines():
        record = validated(Round, parse_json(line.encode(), name)[0], name)
        assert json.dumps(record.plain(), sort_keys=True, allow_nan=False) == line
    for file, model in FILES.items():
        path = RECORDED / name / file
        if path.exists():
            plain = read_record(model, path).plain()
            assert json.dumps(plain, indent=2, sort_keys=True) + "\n" == path.read_text()


@pytest.mark.parametrize(
    ("name", "measure"), [("classifier", ACCURACY), ("language-model", PERPLEXITY)]
)
def test_the_outcome_of_recorded_rounds_is_the_recorded_summary(name, measure):
    record = read_run(RECORDED / name)
    assert record.measure is measure
    summary = record.summary
    derived = summary.model_copy(update=outcome(record.rounds, measure, summary.target(measure)))
    assert derived.plain() == summary.plain()


def test_a_recorded_run_has_its_page(tmp_path):
    folder = copytree(RECORDED / "language-model", tmp_path / "run")
    record = read_run(folder)
    text = write_run_page(folder).read_text(encoding="utf-8")
    assert f"held-out perplexity is {record.quality:.3f}" in text
    assert record.sample.prompt in text


def test_what_was_not_set_is_not_written_and_what_is_undefined_is_null():
    record = Round(
        index=2,
        accuracy=float("nan"),
        loss=float("inf"),
        train_loss=1.5,
        clients=(ClientRound(client="a", train_loss=float("nan")),),
        dropped=(DroppedClient(client="b", reason="late"),),
        bytes_up=Traffic(adapter=3, head=4),
        bytes_down=Traffic(adapter=0, head=0),
        modules=(ModuleRound(module="m", kept_rank=2, error_floor=float("-inf")),),
        seconds={"train": 1.0, "save": float("nan")},
    )
    assert record.plain() == {
        "round": 2,
        "accuracy": None,
        "loss": None,
        "train_loss": 1.5,
        "clients": [{"client": "a", "train_loss": None}],
        "dropped": [{"client": "b", "reason": "late"}],
        "bytes_up": {"adapter": 3, "head": 4},
        "bytes_down": NOTHING,
        "modules": [{"module": "m", "kept_rank": 2, "error_floor": None}],
        "seconds": {"train": 1.0},
    }
    assert Round.model_validate(record.plain()).plain() == record.plain()


def test_keys_of_later_versions_are_ignored_but_in_the_environment():
    assert Round.model_validate({**TRAINED, "later": 1}).plain() == TRAINED
    assert Environment.model_validate({"later": 1}).plain() == {"later": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": "high"}, "F, line 3: 'accuracy' is 'high'; it must be a number or null"),
        ({"accuracy": True}, "F, line 3: 'accuracy' is True; it must be a number or null"),
        ({"round": 1.5}, "F, line 3: 'round' is 1.5; it must be a whole number"),
        (
            {"bytes_up": {"adapter": -1, "head": 0}},
            "F, line 3, 'bytes_up': 'adapter' is -1; it must be greater than or equal to 0",
        ),
        ({"bytes_up": {"adapter": 1}}, "F, line 3, 'bytes_up': field 'head' is missing"),
        ({"bytes_up": 3}, "F, line 3: 'bytes_up' is 3; it must be an object"),
        ({"clients": [{"client": "a"}, {}]}, "F, line 3, clients[1]: field 'client' is missing"),
        ({"flags": ["a", 2]}, "F, line 3: 'flags[1]' is 2; it must be a string"),
        (
            {"sampled": ["a", "a"]},
            "F, line 3: 'sampled' is ['a', 'a']; it must be a list of strings that are all "
            "different",
        ),
    ],
)
def test_an_error_names_place_field_and_what_is_wanted(changes, message):
    with pytest.raises(FedcoreError) as caught:
        validated(Round, {**TRAINED, **changes}, "F, line 3")
    assert str(caught.value) == message


def test_an_error_shows_little_of_a_long_value():
    with pytest.raises(FedcoreError) as caught:
        validated(Sample, {"domain": ["x" * 500]}, "sample.json")
    assert len(str(caught.value)) < 130


def test_what_is_no_object_is_refused():
    with pytest.raises(FedcoreError, match=r"^F: it is \[\]; it must be an object$"):
        validated(Round, [], "F")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "environment.json"
    with pytest.raises(FedcoreError, match=r"cannot read .*environment\.json"):
        read_record(Environment, file)
    file.write_text("[" * 100_000)
    with pytest.raises(FedcoreError, match=r"cannot read .*environment\.json"):
        read_record(Environment, file)


def test_an_infinite_number_of_an_older_file_is_undefined(tmp_path):
    file = tmp_path / "summary.json"
    recorded = json.loads((RECORDED / "language-model" / "summary.json").read_text())
    file.write_text(json.dumps({**recorded, "perplexity": float("inf")}))
    assert read_record(Summary, file).perplexity is None


def test_undefined_numbers_are_counted():
    assert parse_json(b'{"a": NaN, "b": [-Infinity, 1]}', "F") == ({"a": None, "b": [None, 1]}, 2)


def test_the_largest_epsilon_is_of_the_first_client_that_has_it():
    common = {"accountant": "rdp", "delta": 1e-5, "noise_multiplier": 1.0, "noise": "seeded"}
    spent = PrivacySpent(max_grad_norm=1.0, epsilon={"c": 2.0, "b": 2.0, "a": 1.0}, **common)
    assert spent.largest == ("b", 2.0)
    last = Round.model_validate(TRAINED).model_copy(update={"privacy": spent})
    found = outcome([last], ACCURACY, None)["privacy"]
    assert (found.largest_epsilon_client, found.largest_epsilon) == ("b", 2.0)
    assert outcome([], ACCURACY, None)["privacy"] is None


def test_bytes_to_the_target_are_those_until_the_first_round_that_reaches_it():
    sent = Traffic(adapter=3, head=4)
    rounds = [
        Round(index=-1, accuracy=0.95, loss=1.0),
        *(
            Round.model_validate(TRAINED).model_copy(
                update={"index": t, "accuracy": accuracy, "bytes_up": sent}
            )
            for t, accuracy in enumerate((0.2, None, 0.9, 0.8))
        ),
    ]
    found = outcome(rounds, ACCURACY, 0.85)
    assert (found["rounds_to_target"], found["bytes_to_target"]) == (3, 21)
    assert (found["accuracy"], found["best_accuracy"]) == (0.8, 0.95)
    assert found["bytes_up"] == Traffic(adapter=12, head=16)
    missed = outcome(rounds, ACCURACY, 0.99)
    assert (missed["rounds_to_target"], missed["bytes_to_target"]) == (None, None)
