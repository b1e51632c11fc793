"""Sites with data of their own behind Flower's messages: Flower's real apps, without sockets."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from click import ClickException
from flwr.app import MetricRecord, RecordDict

from fedcore.experiments import holdings
from fedcore.experiments import run as local
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from fedcore.transports.flower import apps, recipe_strategy
from fedcore.transports.flower.apps import serve
from fedcore.transports.flower.client import model_tensors
from fedcore.transports.flower.messages import to_arrays
from fedcore.transports.flower.reply_metrics import read_sums
from fedcore.transports.flower.site_strategy import SiteStrategy
from tests.experiments.site_jobs import site_recipe, write_site, write_sites
from tests.transports.flower.site_nodes import join, site_grid

LABELS = ["film", "money", "sport"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sites")
    write_sites(home / "sites")
    # The same rows as hospital-a's, under other names.
    write_site(home / "own notes a.jsonl", 100, 0, "note", "diagnosis")
    return home


@pytest.fixture(scope="module", autouse=True)
def processes():
    """One process stands for those of all nodes, and keeps what each of them would build once."""
    cached, apps._experiment = apps._experiment, lru_cache(None)(apps._experiment.__wrapped__)
    yield
    apps._experiment = cached


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(recipe_strategy, "POLL", 0.0)


class Seen(Observer):
    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


def deployed(home, task="classification", **settings):
    common = {
        "data.source": "sites",
        "round.expected": 2,
        "round.patience": 0.0,
        "evaluation.on": "sites",
        "evaluation.min_targets": 5,
    }
    if task == "classification":
        common["data.labels"] = LABELS
    return site_recipe(home, task, **{**common, **settings})


def nodes(home, **further):
    return {
        7: f'site="hospital-b" data="{home}/sites/hospital-b.jsonl" batch-size=8 device="cpu"',
        9: f'site="hospital-a" data="{home}/own notes a.jsonl" columns="note:text,diagnosis:label"',
        **further,
    }


def causal_nodes(home):
    return {
        i: f'site="{name}" data="{home}/sites/{name}.jsonl"'
        for i, name in enumerate(("hospital-b", "hospital-a"))
    }


def through_flower(recipe, grid, observer=None):
    server = build_experiment(recipe, Observer())
    strategy = SiteStrategy(server, observer=observer)
    strategy.start(grid, to_arrays(model_tensors(server)), num_rounds=recipe.rounds)
    return strategy


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("classification", {}),
        ("classification", {"adapter.layers": [-1], "method.name": "fedex"}),
        ("causal", {}),
        ("sft", {"round.weighting": "tokens", "adapter.dropout": 0.1}),
    ],
    ids=["classifier", "cached prefix and residual", "language model", "instruction tuning"],
)
def test_the_local_engines_adapter_bit_for_bit(task, settings, home, tmp_path):
    """Sites by their node-config and files under one folder are the same federation."""
    common = {"evaluation.on": "sites", "evaluation.min_targets": 5, **settings}
    if task == "classification":
        common["data.labels"] = LABELS
    simulation = site_recipe(home, task, **{"data.sites": str(home / "sites"), **common})
    local.start(simulation, tmp_path / "local")
    expected = read_state(latest_state(tmp_path / "local" / "state"))
    configs = causal_nodes(home) if task == "causal" else nodes(home)
    recipe = deployed(home, task, **settings)
    strategy = through_flower(recipe, site_grid(recipe, configs))
    assert torch.equal(strategy.state.row, expected.row)
    unseen = {"seconds", "upload_error"}
    ours, theirs = (
        {key: value for key, value in state.record.items() if key not in unseen}
        for state in (strategy.state, expected)
    )
    assert ours == theirs
    assert ours["sites"]["answered"] == ["hospital-a", "hospital-b"]
    assert ours["sites"]["examples"] == 28
    assert ours["accuracy"] == ours["sites"]["accuracy"]


def test_what_became_of_the_sites_rows_is_in_the_first_record_and_said_once(home):
    recipe = deployed(home, "sft")
    grid, seen = site_grid(recipe, nodes(home)), Seen()
    first, second = through_flower(recipe, grid, seen).states
    rows = {c["client"]: c["rows"] for c in first.record["clients"]}
    assert {site: counts["read"] for site, counts in rows.items()} == {
        "hospital-a": 100,
        "hospital-b": 40,
    }
    assert all("rows" not in c for c in second.record["clients"])
    said = [text for text in seen.texts if "rows read" in text]
    assert len(said) == 1
    assert said[0].startswith("140 rows read")


def test_weights_and_evaluation_are_of_each_sites_own_rows(home, monkeypatch):
    """100 and 40 rows under other column names, a third site that never comes, no server data."""
    monkeypatch.setattr(holdings, "partition", None)
    monkeypatch.setattr(holdings, "split_indices", None)
    recipe = deployed(home, **{"round.expected": 3, "round.quorum": 2})
    grid, seen, weights = site_grid(recipe, nodes(home)), Seen(), []
    app = grid.handlers[7]

    def watched(message, context):
        reply = app(message, context)
        if message.metadata.message_type == "train":
            weights.append(reply.content["metrics"]["num-examples"])
        elif message.metadata.message_type == "evaluate":
            metrics = reply.content["metrics"]
            assert set(metrics) == {"num-examples", "targets", "correct", "loss-sum"}
            weights.append(metrics["num-examples"])
        return reply

    grid.handlers = dict.fromkeys(grid.handlers, watched)
    strategy = through_flower(recipe, grid, seen)
    assert sorted(weights) == [8, 8, 20, 20, 32, 32, 80, 80]
    assert "the run starts with 2 of 3 expected sites" in seen.texts
    record = strategy.state.record
    assert {c["client"]: c["examples"] for c in record["clients"]} == {
        "hospital-a": 80,
        "hospital-b": 32,
    }
    # The mean of sums is weighted by predictions.
    parts = {c["client"]: c["global_loss"] for c in record["clients"]}
    mean = (20 * parts["hospital-a"] + 8 * parts["hospital-b"]) / 28
    assert record["loss"] == pytest.approx(mean, rel=1e-12)


def test_a_site_of_few_predictions_answers_none_of_them(home):
    recipe = deployed(home, **{"evaluation.min_targets": 10, "rounds": 1})
    grid = site_grid(recipe, nodes(home))
    app, replies = grid.handlers[7], []

    def kept(message, context):
        replies.append(app(message, context))
        return replies[-1]

    grid.handlers[7] = kept
    record = through_flower(recipe, grid).state.record
    assert record["sites"]["answered"] == ["hospital-a"]
    assert record["sites"]["targets"] == 20
    # Nor does the reply to its training hold a mean over them.
    assert [sorted(r.content.metric_records) for r in replies] == [[], ["metrics"], []]
    assert set(replies[1].content["metrics"]) == {"num-examples", "train-loss"}


def test_messages_hold_neither_paths_nor_rows_nor_columns(home):
    recipe = deployed(home)
    grid = site_grid(recipe, nodes(home))
    app, texts = grid.handlers[7], []

    def kept(message, context):
        reply = app(message, context)
        texts.extend([repr(message.content), repr(reply.content)])
        return reply

    grid.handlers = dict.fromkeys(grid.handlers, kept)
    through_flower(recipe, grid)
    everything = "\n".join(texts)
    assert "hospital-a" in everything
    for word in (str(home / "sites"), "own notes", "jsonl", "note:text", "diagnosis", "goal"):
        assert word not in everything, word


SECRET = "Patient-Zero"


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ('site="c" data="{file}" colums="a:text"', ""),
        ('site="c" data="{folder}/none.jsonl"', ""),
        ('site="c" data="{file}"', json.dumps({"text": SECRET, "label": SECRET})),
        ('site="c" data="{file}"', json.dumps({"txt": SECRET, "label": "sport"})),
        ('site="c" data="{file}" model="{folder}/none"', ""),
        ("partition-id=0 num-partitions=2", ""),
        ('site="Hospital C" data="{file}"', ""),
    ],
    ids=["key", "absent file", "label", "column", "model", "no data", "name"],
)
def test_a_site_that_cannot_take_part_says_so_without_its_secrets(
    config, rows, home, tmp_path, caplog
):
    file = write_site(tmp_path / "c.jsonl", 20, 5)
    with file.open("a") as handle:
        handle.write(rows)
    recipe = deployed(home, rounds=1)
    grid, seen = site_grid(recipe, nodes(home)), Seen()
    join(grid, 3, config.format(file=file, folder=tmp_path))
    strategy = through_flower(recipe, grid, seen)
    assert strategy.state.record["dropped"] == [] or "model" in config
    said = " ".join([*seen.texts, str(strategy.state.record)])
    assert "a site cannot take part (FedcoreError); its own log has the reason" in said
    assert SECRET not in said + caplog.text
    assert str(tmp_path) not in said


def test_a_bare_path_is_refused_by_flower_itself(home):
    with pytest.raises(ClickException, match="invalid format"):
        site_grid(deployed(home), {1: "site=a data=/srv/x.jsonl"})


def test_a_second_node_of_one_name_is_refused_until_the_first_is_gone(home):
    recipe = deployed(home, rounds=3)
    grid, seen = site_grid(recipe, nodes(home)), Seen()
    config = nodes(home)[7]

    class Moves(Seen):
        def round_finished(self, record):
            if record["round"] == 0:
                join(grid, 4, config)
            if record["round"] == 1:
                del grid.handlers[7]

    seen = Moves()
    strategy = through_flower(recipe, grid, seen)
    assert [t for t in seen.texts if "keeps the name" in t] == [
        "node 4 says it is hospital-b, as node 7 does, which keeps the name"
    ]
    trained = [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"]
    assert trained == [9, 7, 9, 7, 9, 4]
    assert strategy.state.record["dropped"] == []


def test_a_newcomer_takes_part_in_the_next_round_and_receives_everything(home):
    recipe = deployed(home, **{"rounds": 3, "clients": 3, "method.name": "rolora"})
    grid = site_grid(recipe, nodes(home))
    folder = write_site(home / "c.jsonl", 30, 8)

    class Joins(Seen):
        def round_finished(self, record):
            if record["round"] == 0:
                join(grid, 1, f'site="hospital-d" data="{folder}"')
                join(grid, 2, f'site="hospital-c" data="{folder}"')

    seen = Joins()
    strategy = through_flower(recipe, grid, seen)
    assert [len(s.record["sampled"]) for s in strategy.states] == [2, 3, 3]
    assert "node 2 says it is hospital-c, and clients = 3 sites are there" in seen.texts
    trains = [m for m in grid.sent if m.metadata.message_type == "train"]
    sizes = {node: [] for node in (1, 9)}
    for message in trains:
        if message.metadata.dst_node_id in sizes:
            sizes[message.metadata.dst_node_id].append(len(message.content["arrays"]))
    assert sizes[1][0] == sizes[9][0] > sizes[9][1]
    assert strategy.state.record["dropped"] == []


def test_a_round_below_the_quorum_is_repeated_once(home):
    recipe = deployed(home)
    grid, failures, seen = site_grid(recipe, nodes(home)), [], Seen()
    app = grid.handlers[7]

    def fails(message, context):
        if message.metadata.message_type == "train" and not failures:
            failures.append(message)
            raise TimeoutError
        return app(message, context)

    grid.handlers[7] = fails
    strategy = through_flower(recipe, grid, seen)
    assert strategy.state.round == 2
    assert [s.record["dropped"] for s in strategy.states] == [[], []]
    assert "round 0 has 1 valid replies of at least 2: it is repeated" in seen.texts
    whole = site_grid(recipe, nodes(home))
    assert torch.equal(through_flower(recipe, whole).state.row, strategy.state.row)


def test_a_run_that_loses_its_quorum_ends_with_its_state_saved_and_resumes(home, tmp_path):
    recipe, seen = deployed(home, rounds=3), Seen()
    grids = [site_grid(recipe, nodes(home)), site_grid(recipe, nodes(home))]
    app = grids[0].handlers[7]

    def gone(message, context):
        if message.metadata.message_type == "train" and seen.rounds:
            raise TimeoutError
        return app(message, context)

    class Counts(Seen):
        rounds = 0

        def round_finished(self, record):
            self.rounds += 1

    seen = Counts()
    grids[0].handlers[7] = gone
    used = iter(grids)

    def rounds(experiment, folder, state, observer):
        yield from serve(experiment, folder, next(used), observer).states

    summary = local.start(recipe, tmp_path / "run", seen, rounds=rounds)
    assert (summary["finished"], summary["rounds"]) == (False, 1)
    assert [t for t in seen.texts if "twice" in t] == [
        "round 1 has 1 valid replies of at least 2, twice: the run ends after 1 rounds; start it "
        "again with the same run folder to resume"
    ]
    assert local.resume(tmp_path / "run", seen, rounds=rounds)["finished"]
    expected = through_flower(recipe, site_grid(recipe, nodes(home)))
    found = read_state(latest_state(tmp_path / "run" / "state"))
    assert torch.equal(found.row, expected.state.row)
    assert not (tmp_path / "run" / "sample.json").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"targets": 4}, "correct of 4 targets"),
        ({"correct": 21}, "21 correct of 20 targets"),
        ({"loss-sum": -1.0}, "its loss-sum is -1"),
        ({"num-examples": 2.5}, "its num-examples is 2.5"),
        ({"loss-sum": None}, "does not say loss-sum"),
    ],
)
def test_sums_that_cannot_be_true_are_refused(change, problem):
    values = {"num-examples": 20, "targets": 20, "correct": 3, "loss-sum": 21.5, **change}
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ValueError, match=problem):
        read_sums(RecordDict({"metrics": MetricRecord(values)}), 5)
    assert read_sums(RecordDict(), 5) is None


def test_a_deployment_of_sites_is_not_simulated(home, tmp_path):
    with pytest.raises(ValueError, match="is a deployment, whose nodes have the data"):
        local.start(deployed(home), tmp_path / "run")
