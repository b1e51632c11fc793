"""What a report says of differential privacy."""

import io
import json

import pytest
from rich.console import Console

from fedcore.cli.progress import ProgressDisplay
from fedcore.errors import FedcoreError
from fedcore.reports.notes import run_notes
from fedcore.reports.page import write_run_page
from fedcore.reports.reading import read_run
from fedcore.reports.tables import final_grid
from tests.reports.fake_run import write_fake_run

SPENT = {
    "accountant": "prv",
    "delta": 1e-5,
    "noise_multiplier": 1.1,
    "max_grad_norm": 0.5,
    "noise": "secret",
    "epsilon": {"client-00": 2.345, "client-01": 7.891, "client-02": 7.1},
}


def private_run(folder, **changes):
    """A run whose clients spend as much in every round; ``changes`` are the last round's."""
    write_fake_run(folder)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rounds = [line for line in lines if line["round"] >= 0]
    for i, line in enumerate(rounds, start=1):
        spent = {name: value * i / len(rounds) for name, value in SPENT["epsilon"].items()}
        line["privacy"] = {**SPENT, "epsilon": spent}
    lines[-1]["privacy"].update(changes)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_last_round_says_what_was_spent(tmp_path):
    record = read_run(private_run(tmp_path))
    assert record.rounds[0].privacy is None
    assert record.privacy.largest == ("client-01", pytest.approx(7.891))
    assert record.trained[0].privacy.largest[1] < 7.891
    assert record.privacy.epsilon == pytest.approx(SPENT["epsilon"])
    (note,) = [note for note in run_notes(record) if "epsilon" in note]
    assert "client-01 has spent the most, epsilon 7.89 at delta 1.0e-5 (accountant prv" in note
    assert "noise multiplier 1.10, gradients clipped to norm 0.500" in note


def test_noise_that_a_seed_gives_away_is_said_to_be(tmp_path):
    notes = run_notes(read_run(private_run(tmp_path, noise="seeded")))
    assert sum("whoever knows the seed can take it away" in note for note in notes) == 1


def test_the_page_shows_it(tmp_path):
    text = write_run_page(private_run(tmp_path)).read_text(encoding="utf-8")
    assert "largest epsilon" in text
    assert "7.89" in text
    assert "client-01, at delta 1.0e-5" in text


def test_the_terminal_shows_it_after_every_round_and_at_the_end(tmp_path):
    record = read_run(private_run(tmp_path))
    rows = dict(final_grid(record).rows)
    assert rows["largest epsilon of an example"] == "7.89 at delta 1.0e-5 (client-01, prv)"
    assert "epsilon of a whole client" not in rows
    shown = io.StringIO()
    line = (
        record.rounds[-1]
        .model_copy(update={"train_loss": 1.5, "accuracy": None, "loss": None})
        .plain()
    )
    del line["privacy"]
    central = {**SPENT, "max_norm": 1.0, "epsilon": 3.456}
    display = ProgressDisplay(Console(file=shown, width=200))
    for extra in ({}, {"privacy": SPENT}, {"central_privacy": central}):
        display.round_finished({**line, **extra})
    plain, single, central = shown.getvalue().splitlines()
    assert "epsilon" not in plain
    assert single.endswith("train loss 1.500   largest epsilon 7.89")
    assert central.endswith("train loss 1.500   central epsilon 3.46")


def test_a_run_without_privacy_says_nothing(tmp_path):
    write_fake_run(tmp_path)
    record = read_run(tmp_path)
    assert record.privacy is None
    assert not [note for note in run_notes(record) if "epsilon" in note]
    assert "epsilon" not in write_run_page(tmp_path).read_text(encoding="utf-8")
    assert not [row for row in final_grid(record).rows if "epsilon" in row[0]]


def test_a_record_that_lacks_a_part_is_named(tmp_path):
    with pytest.raises(FedcoreError, match=r"'privacy': 'accountant' is None"):
        read_run(private_run(tmp_path, accountant=None))


def test_whole_clients_have_an_epsilon_of_their_own(tmp_path):
    write_fake_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    known = ("accountant", "delta", "noise_multiplier")
    central = {key: SPENT[key] for key in known}
    lines[-1]["central_privacy"] = {**central, "max_norm": 0.25, "noise": "seeded", "epsilon": 3.21}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(tmp_path)
    assert record.privacy is None
    assert record.central_privacy.epsilon == 3.21
    rows = dict(final_grid(record).rows)
    assert rows["epsilon of a whole client"] == "3.21 at delta 1.0e-5 (prv)"
    notes = run_notes(record)
    (note,) = [note for note in notes if "whole clients" in note]
    assert "epsilon 3.21 at delta 1.0e-5" in note
    assert "updates clipped to norm 0.250" in note
    assert sum("whoever knows the seed" in note for note in notes) == 1
    text = write_run_page(tmp_path).read_text(encoding="utf-8")
    assert "central epsilon" in text
    assert "3.21" in text
