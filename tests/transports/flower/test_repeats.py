"""Recipe clients and clients of an app behind Flower: base, scaling, and replies played again."""

import logging
import re
import shutil

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from transformers import BertForSequenceClassification

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.training.base_identity import identity_of
from fedcore.training.live_adapter import live_adapter
from fedcore.transports.flower import FedLoRA, from_arrays, repeat, to_arrays
from fedcore.transports.flower.client import ClientMemory, model_tensors
from fedcore.transports.flower.messages import ReplyInfo, RoundConfig
from fedcore.transports.flower.recipe_strategy import RecipeStrategy
from tests.experiments.jobs import tiny_recipe
from tests.training.trainer_rounds import lora_bert
from tests.transports.flower.grid import FakeGrid
from tests.transports.flower.recipe_nodes import recipe_handler, recipe_nodes
from tests.tuners.tiny import bert


def run(recipe, handlers=None, rounds=2, **options):
    server, clients = (build_experiment(recipe, Observer()) for _ in range(2))
    grid = FakeGrid(recipe_nodes(clients))
    grid.handlers |= (handlers or (lambda grid: {}))(grid)
    strategy = RecipeStrategy(server)
    strategy.start(grid, to_arrays(model_tensors(server)), num_rounds=rounds, **options)
    return strategy, grid


@pytest.fixture(scope="module")
def elsewhere(home, tmp_path_factory):
    """The tiny model with other weights of the same shapes, and one with another template."""
    tiny_recipe(home)
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(home / "model", folder / "weights")
    model = BertForSequenceClassification.from_pretrained(home / "model")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.add_(0.5)
    model.save_pretrained(folder / "weights")
    shutil.copytree(home / "model", folder / "template")
    (folder / "template" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def reasons(strategy):
    return {d["client"]: d["reason"] for d in strategy.state.record["dropped"]}


def at(node, client, home, source, **settings):
    """A node that holds another model than the recipe's server."""
    settings = {**settings, "model.source": str(source)}
    experiment = build_experiment(tiny_recipe(home, **settings), Observer())
    return lambda grid: {node: recipe_handler(experiment, client)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights", r"weights, first bert\.encoder\.layer\.1\.output\.dense\.weight; load"),
        ("template", "template, first chat_template; set the server's chat template"),
    ],
)
def test_a_client_on_another_base_does_not_train(kind, message, home, elsewhere, monkeypatch):
    trained = []
    from fedcore.transports.flower import client as module

    genuine = module.train_one_client

    def noted(experiment, broadcast, round, client, *rest):
        trained.append(client)
        return genuine(experiment, broadcast, round, client, *rest)

    monkeypatch.setattr(module, "train_one_client", noted)
    settings = {"round.on_invalid": "drop", "rounds": 1}
    handlers = at(993, "client-01", home, elsewhere / kind, **settings)
    strategy, _ = run(tiny_recipe(home, **settings), handlers, rounds=1)
    assert list(reasons(strategy)) == ["client-01"]
    assert "its base differs from the server's in its " in reasons(strategy)["client-01"]
    with pytest.raises(FedcoreError, match=f"round 0: client client-01: .*{message}"):
        run(tiny_recipe(home, rounds=1), handlers, rounds=1)
    assert sorted(set(trained)) == ["client-00", "client-02", "client-03"]


def test_messages_say_how_many_rounds_there_are_and_no_reply_repeats_it(home):
    said = {"server": [], "clients": []}

    def handlers(grid):
        genuine = grid.handlers[993]

        def handle(message, context):
            reply = genuine(message, context)
            if message.metadata.message_type == "train":
                said["server"].append(RoundConfig.read(message.content).announced)
                said["clients"].append(ReplyInfo.read(reply.content).said)
            return reply

        return {993: handle}

    run(tiny_recipe(home, rounds=2), handlers)
    assert [announced.total_rounds for announced in said["server"]] == [2, 2]
    assert [answer.total_rounds for answer in said["clients"]] == [None, None]


def test_an_allowed_difference_is_flagged_in_every_round(home, elsewhere):
    settings = {"model.allow": ["template"], "rounds": 2}
    handlers = at(993, "client-01", home, elsewhere / "template", **settings)
    strategy, _ = run(tiny_recipe(home, **settings), handlers)
    flag = (
        "client-01: its base differs from the server's in its template, first chat_template, as "
        "allowed"
    )
    assert [state.record["flags"] for state in strategy.states] == [[flag], [flag]]
    assert strategy.state.record["dropped"] == []


def recorded(replies, node, change):
    """A node that may send something else than what its client made."""

    def handlers(grid):
        genuine = grid.handlers[node]

        def handle(message, context):
            reply = genuine(message, context)
            if message.metadata.message_type == "train":
                replies.append(reply)
                reply = change(replies, message)
            return reply

        return {node: handle}

    return handlers


def first_again(replies, message):
    return Message(replies[0].content, reply_to=message)


def silent(replies, message):
    content = RecordDict({k: v for k, v in replies[-1].content.items() if k != "fedcore"})
    return Message(content, reply_to=message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_again, "its upload is for round 0"),
        (silent, "it does not say which round and broadcast it is of"),
    ],
)
def test_a_reply_that_is_played_again_or_says_nothing_is_refused(change, message, home):
    recipe = tiny_recipe(home, **{"round.on_invalid": "drop"})
    strategy, _ = run(recipe, recorded([], 993, change))
    assert message in reasons(strategy)["client-01"]
    others = [state.record["clients"] for state in strategy.states]
    assert [c["client"] for c in others[1] if c["train_loss"] is not None] == [
        "client-00",
        "client-02",
        "client-03",
    ]


def test_a_reply_of_an_equal_round_of_another_run_is_refused(home):
    """The same round and tensors, another broadcast."""
    replies = []
    run(tiny_recipe(home, seed=1), recorded(replies, 993, lambda r, m: r[-1]))
    foreign = iter(replies)
    recipe = tiny_recipe(home, **{"round.on_invalid": "drop"})
    again = recorded([], 993, lambda r, m: Message(next(foreign).content, reply_to=m))
    strategy, _ = run(recipe, again)
    assert reasons(strategy) == {
        "client-01": "it started from another broadcast than this server's"
    }


def test_a_client_whose_memory_is_of_another_broadcast_does_not_train(home):
    recipe = tiny_recipe(home, **{"method.name": "rolora", "rounds": 2})

    def handlers(grid):
        genuine = grid.handlers[993]

        def handle(message, context):
            if message.metadata.message_type == "train" and len(context.state):
                memory = ClientMemory.read(context.state, "")
                ClientMemory(memory.row + 1, memory.own).write(context.state, "")
            return genuine(message, context)

        return {993: handle}

    strategy, _ = run(recipe, handlers)
    assert "are not the broadcast of round 1" in reasons(strategy)["client-01"]
    # It is sent everything the next time.
    assert "client-01" not in strategy.state.client_versions


# Clients of an app of one's own.

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["query", "value"]}


def own_client(node, config=CONFIG, base=None, says=True):
    def handle(message, context):
        tensors = {k: t + 0.1 * node for k, t in from_arrays(message.content["arrays"]).items()}
        metrics = MetricRecord({"num-examples": 1.0})
        content = {"arrays": to_arrays(tensors), "metrics": metrics}
        if says:
            content["fedcore"] = repeat(message.content, config, base)
        return Message(RecordDict(content), reply_to=message)

    return handle


def app(handlers, rounds=1, **options):
    strategy = FedLoRA("fedit", fraction_evaluate=0.0, on_invalid="drop", **options)
    grid = FakeGrid({n: own_client(n) for n in (1, 2, 3)} | handlers)
    initial = to_arrays(live_adapter(lora_bert()).to_peft())
    strategy.start(grid, initial, num_rounds=rounds)
    return strategy


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 32}, r"has scaling 10\.6667, .* is 2"),
        ({"use_rslora": True}, r"has scaling 3\.4641, .* is 2"),
        ({"alpha_pattern": {"query": 9}}, r"has scaling 3, .* is 2"),
        ({"peft_type": "ADALORA"}, "has peft_type = 'ADALORA', .* 'LORA'"),
    ],
)
def test_another_scaling_or_kind_is_refused_in_an_app(change, message, knows):
    options = {"adapter_config": CONFIG} if knows else {}
    strategy = app({2: own_client(2, {**CONFIG, **change})}, **options)
    (reason,) = reasons(strategy).values()
    assert re.search(message, reason)
    # Where the server says what it is, the client knows before it trains.
    assert ("its node sent an error: this client does not fit round 0" in reason) == knows
    assert strategy.state.record["clients"] == {"node-1": 1.0, "node-3": 1.0}


def test_the_configuration_may_be_a_folder_with_the_base_beside_it(tmp_path):
    lora_bert().save_pretrained(tmp_path)
    identity_of(bert()).save(tmp_path)
    good, bad = identity_of(lora_bert()), identity_of(bert().bfloat16())
    handlers = {n: own_client(n, base=good) for n in (1, 3)} | {2: own_client(2, base=bad)}
    strategy = app(handlers, adapter_config=tmp_path)
    assert list(reasons(strategy)) == ["node-2"]
    assert "its base differs from the server's in its quantisation" in reasons(strategy)["node-2"]
    # One that says nothing of its base is refused where the server names one.
    strategy = app({n: own_client(n, base=good) for n in (1, 3)}, adapter_config=tmp_path)
    assert "it does not say which base it trains on" in reasons(strategy)["node-2"]


def test_plain_clients_are_accepted_unless_the_server_wants_none():
    plain = {n: own_client(n, says=False) for n in (1, 2, 3)}
    assert reasons(app(plain, adapter_config=CONFIG, rounds=2)) == {}
    strategy = app({2: own_client(2, says=False)}, plain_clients=False)
    assert "accept such clients by plain_clients=True" in reasons(strategy)["node-2"]


def test_a_client_that_spoke_once_has_to_speak_again():
    silent_later = [own_client(2), own_client(2, says=False)]
    calls = iter(silent_later)
    strategy = app({2: lambda message, context: next(calls)(message, context)}, rounds=2)
    assert "as it did before" in reasons(strategy)["node-2"]


@pytest.mark.parametrize("text", ["", "{", '{"round": 0, "scaling": 3}', "[]"])
def test_an_announcement_that_cannot_be_read_costs_that_client(text):
    def handle(message, context):
        reply = own_client(2)(message, context)
        reply.content["fedcore"] = ConfigRecord({"announced": text})
        return reply

    strategy = app({2: handle})
    assert "its record 'fedcore': " in reasons(strategy)["node-2"]


def test_a_configuration_of_another_adapter_is_refused_at_the_start():
    with pytest.raises(FedcoreError, match=r"says that module .* has rank 4, the adapter has 3"):
        app({}, adapter_config={**CONFIG, "r": 4})


def test_messages_hold_the_parts_of_the_base_and_not_its_tensors(home):
    _, grid = run(tiny_recipe(home, rounds=1), rounds=1)
    message = next(m for m in grid.sent if m.metadata.message_type == "train")
    text = message.content["config"]["fedcore.announced"]
    assert len(text) < 2000
    assert "word_embeddings" not in text


@pytest.fixture(autouse=True)
def quiet_log():
    logging.getLogger("flwr").setLevel(logging.ERROR)
