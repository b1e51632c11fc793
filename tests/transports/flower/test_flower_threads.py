"""Server and clients of a recipe compute on the threads that it sets, and differences are said."""

import logging
import tomllib

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.recipes import to_toml
from fedcore.transports.flower import apps
from fedcore.transports.flower.apps import client_app, server_app, write_app
from fedcore.transports.flower.client import model_tensors
from fedcore.transports.flower.messages import RECORD, ReplyInfo, to_arrays
from fedcore.transports.flower.recipe_strategy import RecipeStrategy
from tests.experiments.jobs import tiny_recipe
from tests.experiments.messages import Messages
from tests.transports.flower.grid import FakeGrid
from tests.transports.flower.recipe_nodes import recipe_nodes

SMALL = {"rounds": 1, "clients": 2, "training.steps": 1}


def answers(handler, threads):
    """``handler``, whose node says that it computes on ``threads``; None says nothing of them."""

    def handle(message, context):
        reply = handler(message, context)
        if message.metadata.message_type == MessageType.QUERY:
            said = reply.content[RECORD]
            assert said.pop("threads") == torch.get_num_threads()
            if threads is not None:
                said["threads"] = threads
        return reply

    return handle


@pytest.mark.parametrize(
    ("threads", "warned"),
    [
        ((1, 1), None),
        ((None, None), None),
        ((None, 4), "threads differ: 1 on the server, 4 on client-01 (1 of 2 clients)"),
        ((3, 4), "threads differ: 1 on the server, 3 on client-00 (2 of 2 clients)"),
    ],
)
def test_a_server_says_which_clients_compute_on_other_threads(threads, warned, home):
    experiment, messages = build_experiment(tiny_recipe(home, **SMALL), Observer()), Messages()
    nodes = {
        node: answers(handler, count)
        for (node, handler), count in zip(recipe_nodes(experiment).items(), threads, strict=True)
    }
    strategy = RecipeStrategy(experiment, observer=messages)
    strategy.start(FakeGrid(nodes), to_arrays(model_tensors(experiment)), num_rounds=1)
    if warned is None:
        assert not messages.texts
    else:
        (text,) = messages.texts
        assert text.startswith(warned)
        assert text.endswith("set training.threads")


def test_only_an_introduction_names_threads():
    assert "threads" not in ReplyInfo("client-00", 3).record()
    assert ReplyInfo.read(RecordDict({RECORD: ReplyInfo("a", threads=2).record()})).threads == 2
    assert ReplyInfo.read(RecordDict({RECORD: ConfigRecord({"client": "a"})})).threads == 0
    with pytest.raises(FedcoreError, match="names 'two' threads"):
        ReplyInfo.read(RecordDict({RECORD: ConfigRecord({"threads": "two"})}))


@pytest.mark.parametrize("threads", [None, 3])
def test_a_clients_app_computes_on_the_recipes_threads(threads, home, monkeypatch):
    own = {} if threads is None else {"training.threads": threads}
    text = to_toml(tiny_recipe(home, **SMALL, **own))
    computed = []

    def train(message, context, experiment, client, run):
        computed.append(torch.get_num_threads())
        return Message(RecordDict(), reply_to=message)

    def build(text, settings):
        computed.append(torch.get_num_threads())
        return build_experiment(apps.parse_recipe(text), Observer())

    monkeypatch.setattr(apps, "train", train)
    monkeypatch.setattr(apps, "_experiment", build)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 1},
        state=RecordDict(),
        run_config={"recipe": text},
    )
    app = client_app(apps.configured_recipe)

    def send(kind):
        return app(Message(RecordDict(), dst_node_id=1, message_type=kind), context)

    reply = ReplyInfo.read(send(MessageType.QUERY).content)
    assert (reply.client, reply.threads) == ("client-01", threads or 1)
    send(MessageType.TRAIN)
    assert computed == [threads or 1] * 2
    assert torch.get_num_threads() == 1


def test_a_servers_app_computes_on_the_recipes_threads_and_logs_what_differs(
    home, tmp_path, monkeypatch, caplog
):
    recipe = tiny_recipe(home, **SMALL, **{"training.threads": 3})
    app = write_app(recipe, tmp_path / "app", out=tmp_path / "run")
    config = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    # These nodes share the server's process, but say that they have another number of threads.
    handlers = recipe_nodes(build_experiment(recipe, Observer()))
    nodes = {node: answers(handler, 2) for node, handler in handlers.items()}
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.WARNING, "flwr"):
        server_app()(FakeGrid(nodes), context)
    assert "threads differ: 3 on the server, 2 on client-00 (2 of 2 clients)" in caplog.text
    assert '"threads": 3' in (tmp_path / "run" / "environment.json").read_text()
    assert torch.get_num_threads() == 1
