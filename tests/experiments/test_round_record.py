"""What is written down of a round."""

import json

import pytest

from fedcore.experiments.evaluation import Score
from fedcore.experiments.observer import Observer
from fedcore.experiments.record import ClientReports, round_record
from fedcore.experiments.setup import build_experiment
from tests.experiments.jobs import tiny_recipe


def test_the_training_loss_is_the_mean_over_examples_of_those_that_have_one(home):
    experiment = build_experiment(tiny_recipe(home), Observer())
    counts = [len(experiment.training_indices(client)) for client in sorted(experiment.shards)]
    assert counts[0] != counts[1]
    losses = {"client-00": 1.0, "client-01": 5.0, "client-02": float("nan")}
    written = round_record(
        experiment,
        0,
        Score(),
        ClientReports(losses),
        sampled=sorted(losses),
        dropped={"client-03": "late", "client-02": "away"},
        flags=(),
        up={"adapter": 1, "head": 0},
        down={"adapter": 2, "head": 0},
        seconds={"train": float("inf")},
    )
    record = written.plain()
    expected = (counts[0] + 5 * counts[1]) / (counts[0] + counts[1])
    assert record["train_loss"] == pytest.approx(expected, rel=1e-12)
    assert [line["train_loss"] for line in record["clients"]] == [1.0, 5.0, None, None]
    assert [line["client"] for line in record["dropped"]] == ["client-02", "client-03"]
    assert record["seconds"] == {}
    json.dumps(record, allow_nan=False)
