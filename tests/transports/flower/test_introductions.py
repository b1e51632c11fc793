"""What nodes answer when asked who they are can neither end a run nor keep it from starting."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.transports.flower import recipe_strategy
from fedcore.transports.flower.client import introduce, model_tensors
from fedcore.transports.flower.messages import to_arrays
from fedcore.transports.flower.recipe_strategy import RecipeStrategy
from tests.experiments.jobs import tiny_recipe
from tests.transports.flower.grid import FakeGrid
from tests.transports.flower.recipe_nodes import recipe_nodes

LIAR = 5


class Seen(Observer):
    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe of four clients, and what builds a server and its honest nodes."""
    settings = {"method.name": "fedit", "round.on_invalid": "drop", "rounds": 2}
    return tiny_recipe(tmp_path_factory.mktemp("home"), **settings)


@pytest.fixture(scope="module")
def experiment(job):
    return build_experiment(job, Observer())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(recipe_strategy, "POLL", 0.0)


def started(experiment, grid, observer, rounds):
    """The strategy after a run; nodes train the model of the server, so its start is put back."""
    start = experiment.binding.read().clone()
    strategy = RecipeStrategy(experiment, observer=observer, patience=0.0)
    strategy.start(grid, to_arrays(model_tensors(experiment)), num_rounds=rounds)
    experiment.binding.load(start)
    return strategy


def played(experiment, change, rounds=2):
    """A run whose grid was changed before it began."""
    grid = FakeGrid(recipe_nodes(experiment))
    change(grid)
    return started(experiment, grid, Seen(), rounds), grid


def joined(grid, handler, node=LIAR):
    grid.handlers[node] = handler
    grid.contexts[node] = Context(
        run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}
    )


def content(record):
    return lambda message, context: Message(RecordDict(record), reply_to=message)


NASTY = "\x1b]0;owned\x07\u202e\n"
MANY = {"client": "client-01", "threads": 10**6}
NONSENSE = {
    "a number": content({"fedcore": ConfigRecord({"client": 3})}),
    "bytes": content({"fedcore": ConfigRecord({"client": b"\xff"})}),
    "a list": content({"fedcore": ConfigRecord({"client": ["client-01"]})}),
    "nothing": content({}),
    "metrics": content({"metrics": MetricRecord({"a": 1.0})}),
    "arrays": content({"a": ArrayRecord({"a": Array("f", (1,), "zip", b"PK\x03\x04")})}),
    "text for threads": content({"fedcore": ConfigRecord({"client": "", "threads": "x"})}),
    "a million threads": content({"fedcore": ConfigRecord(MANY)}),
    "a name that does not print": content({"fedcore": ConfigRecord({"client": NASTY * 1000})}),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_a_stranger_who_answers_with_nonsense_is_left_out(name, experiment):
    strategy, grid = played(experiment, lambda grid: joined(grid, NONSENSE[name]), rounds=1)
    assert strategy.state.record["sampled"] == [f"client-0{i}" for i in range(4)]
    assert strategy.state.record["dropped"] == []
    asked = [m for m in grid.sent if m.metadata.dst_node_id == LIAR]
    assert [m.metadata.message_type for m in asked] == ["query"]
    assert strategy._observer.texts
    assert all(text.isprintable() and len(text) < 400 for text in strategy._observer.texts)


@pytest.mark.parametrize("name", NONSENSE)
def test_a_client_who_answers_with_nonsense_does_not_keep_the_run_from_starting(name, experiment):
    """As many nodes as clients are there, and one of them never says who it is."""

    def change(grid):
        grid.handlers[993] = NONSENSE[name]

    strategy, _ = played(experiment, change, rounds=1)
    assert strategy.state.record["dropped"] == [
        {"client": "client-01", "reason": "no node of it is connected"}
    ]
    assert "the run starts without client-01" in strategy._observer.texts


def claiming(name):
    def handle(message, context):
        if message.metadata.message_type == "query":
            return introduce(message, name)
        raise RuntimeError("nothing was trained")

    return handle


def test_a_node_cannot_take_the_place_of_one_that_answers(experiment):
    """It comes later than the honest node, and asks in every round."""

    class Joins(Seen):
        def round_started(self, round, clients, steps):
            if round == 0:
                joined(grid, claiming("client-02"))

    grid = FakeGrid(recipe_nodes(experiment))
    strategy = started(experiment, grid, Joins(), 3)
    assert [state.record["dropped"] for state in strategy.states] == [[], [], []]
    honest, _ = played(experiment, lambda grid: None, rounds=3)
    assert torch.equal(strategy.state.row, honest.state.row)
    (text,) = [text for text in strategy._observer.texts if "client-02" in text]
    assert text == f"node {LIAR} says it is client-02, as node 986 does, which keeps the name"
    # Only the holder was asked once more.
    again = [m for m in grid.sent if m.metadata.message_type == "query"]
    assert [m.metadata.dst_node_id for m in again] == [979, 986, 993, 1000, LIAR, 986]


def test_a_client_under_anothers_name_does_not_keep_the_run_from_starting(experiment):
    def change(grid):
        grid.handlers[993] = claiming("client-03")

    strategy, _ = played(experiment, change, rounds=1)
    dropped = strategy.state.record["dropped"]
    assert dropped == [{"client": "client-01", "reason": "no node of it is connected"}]


def test_the_place_of_a_node_that_is_gone_is_free_again(experiment):
    """First a rival of a node that answers, then the only one with that name."""
    grid = FakeGrid(recipe_nodes(experiment))
    honest = grid.handlers[986]
    texts = []

    class Leaves(Seen):
        def round_started(self, round, clients, steps):
            if round == 0:
                joined(grid, honest)
            if round == 1:
                del grid.handlers[986]

        def message(self, text):
            texts.append(text)

    strategy = started(experiment, grid, Leaves(), 4)
    dropped = [[d["client"] for d in state.record["dropped"]] for state in strategy.states]
    assert dropped[0] == dropped[2] == dropped[3] == []
    assert any("keeps the name" in text for text in texts)


def test_a_node_that_never_answers_delays_few_rounds(experiment):
    def silent(message, context):
        raise TimeoutError

    grid = FakeGrid(recipe_nodes(experiment))

    class Joins(Seen):
        def round_started(self, round, clients, steps):
            joined(grid, silent)

    started(experiment, grid, Joins(), 6)
    assert sum(m.metadata.dst_node_id == LIAR for m in grid.sent) == 3


@pytest.mark.parametrize("examples", [1e12, 1.0, 2**53, 0.0])
def test_a_claim_that_differs_from_the_partition_is_refused(examples, experiment):
    def change(grid):
        genuine = grid.handlers[993]

        def lies(message, context):
            reply = genuine(message, context)
            if message.metadata.message_type == "train":
                reply.content["metrics"]["num-examples"] = float(examples)
            return reply

        grid.handlers[993] = lies

    strategy, _ = played(experiment, change, rounds=1)
    (dropped,) = strategy.state.record["dropped"]
    assert dropped["client"] == "client-01"
    count = experiment.held["client-01"]
    assert dropped["reason"] == (
        f"it reports {examples:g} examples, and the partition gives it {count}"
    )


def test_with_uniform_weighting_a_claim_is_not_read(tmp_path):
    recipe = tiny_recipe(tmp_path, **{"method.name": "fedit", "round.weighting": "uniform"})
    experiment = build_experiment(recipe, Observer())

    def change(grid):
        genuine = grid.handlers[993]

        def lies(message, context):
            reply = genuine(message, context)
            if message.metadata.message_type == "train":
                reply.content["metrics"]["num-examples"] = 1e12
            return reply

        grid.handlers[993] = lies

    liar, _ = played(experiment, change, rounds=1)
    honest, _ = played(experiment, lambda grid: None, rounds=1)
    assert torch.equal(liar.state.row, honest.state.row)
    assert liar.state.record["dropped"] == []
