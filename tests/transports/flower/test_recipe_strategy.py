"""A recipe's clients behind Flower's messages end with the local engine's bits."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from fedcore.transports.flower.apps import serve
from fedcore.transports.flower.client import ClientMemory, introduce, model_tensors
from fedcore.transports.flower.messages import to_arrays
from fedcore.transports.flower.recipe_strategy import RecipeStrategy
from tests.experiments.jobs import tiny_recipe
from tests.transports.flower.grid import FakeGrid
from tests.transports.flower.recipe_nodes import recipe_nodes


def local_state(recipe, folder):
    start(recipe, folder)
    return read_state(latest_state(folder / "state"))


def through_flower(recipe, **options):
    server = build_experiment(recipe, Observer())
    clients = build_experiment(recipe, Observer())
    grid = FakeGrid(recipe_nodes(clients))
    strategy = RecipeStrategy(server)
    initial = to_arrays(model_tensors(server))
    strategy.start(grid, initial, num_rounds=recipe.rounds, **options)
    return strategy, grid


@pytest.mark.parametrize(
    "settings",
    [
        {"method.name": "fedit"},
        {"method.name": "rolora", "rounds": 3},
        {"method.name": "florg"},
        {"method.name": "ffa", "optimiser.state": "keep", "rounds": 3},
        {"method.name": "fedsa", "rounds": 3},
        {"method.name": "ce_lora", "rounds": 3},
        {"method.name": "fedex", "rounds": 3},
        {"method.name": "head_only"},
        {"method.name": "product_svd", "adapter.rank": 4, "adapter.client_ranks": [4, 1, 2]},
        {"method.name": "florg", "adapter.rank": 4, "adapter.client_ranks": [4, 1, 2]},
        {
            "method.name": "rolora",
            "adapter.rank": 4,
            "adapter.client_ranks": [4, 1, 2],
            "round.participation": 0.5,
            "rounds": 5,
        },
        {"method.name": "fedit", "round.codec": "bf16"},
        {"method.name": "rolora", "round.participation": 0.5, "round.dropout": 0.3, "rounds": 4},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_the_same_adapter_as_the_local_engine_bit_for_bit(settings, home, tmp_path):
    recipe = tiny_recipe(home, **settings)
    local = local_state(recipe, tmp_path / "run")
    strategy, _ = through_flower(recipe)
    assert torch.equal(strategy.state.row, local.row)
    assert strategy.state.versions == local.versions
    assert strategy.state.residual.keys() == local.residual.keys()
    for module, part in local.residual.items():
        for one, other in zip(part, strategy.state.residual[module], strict=True):
            assert torch.equal(one, other), module
    # The record is the same too, but for times and what a server behind messages does not see.
    unseen = {"seconds", "upload_error"}
    if strategy.method.capabilities.personalised:
        unseen |= {"accuracy", "loss", "clients", "modules"}
    if recipe.round.dropout:
        # A node that failed may have lost what it held, so it is sent everything again.
        unseen |= {"bytes_down"}
    theirs, ours = (
        {key: value for key, value in state.record.items() if key not in unseen}
        for state in (local, strategy.state)
    )
    assert ours == theirs


def test_what_clients_keep_is_what_the_local_engine_keeps_for_them(home, tmp_path):
    recipe = tiny_recipe(home, **{"method.name": "fedsa", "optimiser.state": "keep"})
    local = local_state(recipe, tmp_path / "run")
    strategy, grid = through_flower(recipe)
    assert len(grid.contexts) == recipe.clients
    for node, context in grid.contexts.items():
        client = f"client-{(1000 - node) // 7:02d}"
        own = ClientMemory.read(context.state, "").own
        assert own.keys() == local.simulated_clients[client].keys()
        for name, tensor in own.items():
            assert torch.equal(tensor, local.simulated_clients[client][name]), (client, name)
    # Nothing of it is on the server.
    assert not strategy.state.held_for_clients


@pytest.mark.parametrize("ranks", [{}, {"adapter.rank": 4, "adapter.client_ranks": [4, 1, 2]}])
def test_later_rounds_send_what_changed(ranks, home):
    settings = {"method.name": "rolora", "rounds": 3, **ranks}
    _, grid = through_flower(tiny_recipe(home, **settings))
    sent = [m for m in grid.sent if m.metadata.message_type == "train"]
    factors = [
        {key.split(".lora_")[1][0] for key in m.content["arrays"] if ".lora_" in key} for m in sent
    ]
    assert factors == [{"A", "B"}] * 4 + [{"B"}] * 4 + [{"A"}] * 4


def test_a_node_that_dies_loses_its_upload_and_not_the_round(home):
    recipe = tiny_recipe(home, rounds=3)
    server, clients = (build_experiment(recipe, Observer()) for _ in range(2))
    grid = FakeGrid(recipe_nodes(clients))
    genuine, calls = grid.handlers[993], []

    def dies(message, context):
        if message.metadata.message_type == "train":
            calls.append(message)
            if len(calls) == 2:
                # As a process that is killed: no reply, and what it held is gone.
                context.state.clear()
                raise TimeoutError
        return genuine(message, context)

    grid.handlers[993] = dies
    strategy = RecipeStrategy(server)
    strategy.start(grid, to_arrays(model_tensors(server)), num_rounds=3)
    assert strategy.state.round == 3
    # It was sent everything again, and took part.
    assert len(calls) == 3
    assert calls[2].content["arrays"].keys() == calls[0].content["arrays"].keys()
    assert len(calls[1].content["arrays"]) <= len(calls[0].content["arrays"])
    assert strategy.state.record["dropped"] == []
    assert strategy.state.client_versions["client-01"] == 1


def test_a_node_that_is_slow_to_say_who_it_is_is_asked_again(home):
    recipe = tiny_recipe(home, rounds=1)
    server, clients = (build_experiment(recipe, Observer()) for _ in range(2))
    grid = FakeGrid(recipe_nodes(clients))
    genuine, questions = grid.handlers[993], []

    def slow(message, context):
        if message.metadata.message_type == "query":
            questions.append(message)
            if len(questions) < 3:
                raise TimeoutError
        return genuine(message, context)

    grid.handlers[993] = slow
    strategy = RecipeStrategy(server)
    strategy.start(grid, to_arrays(model_tensors(server)), num_rounds=1)
    assert len(questions) == 3
    assert strategy.state.record["dropped"] == []
    # Nobody else is bothered.
    assert sum(m.metadata.message_type == "query" for m in grid.sent) == 4 + 2


def test_a_stranger_is_asked_once_and_the_client_waited_for(home):
    recipe = tiny_recipe(home, rounds=1)
    server, clients = (build_experiment(recipe, Observer()) for _ in range(2))
    grid = FakeGrid(recipe_nodes(clients))
    genuine = grid.handlers.pop(993)
    asked, seen = [], []

    def stranger(message, context):
        asked.append(message)
        return introduce(message, "client-99")

    class Said(Observer):
        def message(self, text):
            seen.append(text)
            grid.handlers[993] = genuine

    grid.handlers[5] = stranger
    grid.contexts[5] = grid.contexts[993]
    strategy = RecipeStrategy(server, observer=Said())
    strategy.start(grid, to_arrays(model_tensors(server)), num_rounds=1)
    assert len(asked) == 1
    assert seen == [
        "a node says it is 'client-99', which the recipe lacks",
        "waiting for 1 clients, first client-01",
    ]
    assert strategy.state.record["sampled"] == [f"client-0{i}" for i in range(4)]
    assert strategy.state.record["dropped"] == []


def test_a_node_that_comes_in_anothers_place_receives_everything(home, tmp_path):
    recipe = tiny_recipe(home, **{"method.name": "rolora", "rounds": 3})
    server, clients = (build_experiment(recipe, Observer()) for _ in range(2))
    grid = FakeGrid(recipe_nodes(clients))

    class Moves(Observer):
        def round_finished(self, record):
            if record["round"] == 0:
                grid.handlers[4] = grid.handlers.pop(993)
                grid.contexts[4] = replace_node(grid.contexts.pop(993), 4)

    strategy = RecipeStrategy(server, observer=Moves())
    strategy.start(grid, to_arrays(model_tensors(server)), num_rounds=3)
    assert strategy.state.record["dropped"] == []
    assert torch.equal(strategy.state.row, local_state(recipe, tmp_path / "run").row)
    sent = [m for m in grid.sent if m.metadata.message_type == "train"]
    own = [len(m.content["arrays"]) for m in sent if m.metadata.dst_node_id in (993, 4)]
    assert own[0] == own[1] > own[2]


def replace_node(context, node):
    """The context of a machine that has never been part of the run."""
    return Context(
        run_id=context.run_id, node_id=node, node_config={}, state=RecordDict(), run_config={}
    )


@pytest.mark.parametrize("method", ["rolora", "fedex"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(method, home, tmp_path):
    recipe = tiny_recipe(home, **{"method.name": method, "rounds": 4})

    def rounds(experiment, folder, state, observer):
        # Nodes that were started anew: they hold nothing of the run.
        grid = FakeGrid(recipe_nodes(build_experiment(recipe, Observer())))
        yield from serve(experiment, folder, grid, observer).states

    class Killed(Observer):
        def round_finished(self, record):
            if record["round"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "run", Killed(), rounds=rounds)
    assert read_state(latest_state(tmp_path / "run" / "state")).round == 2
    resume(tmp_path / "run", rounds=rounds)
    found = read_state(latest_state(tmp_path / "run" / "state"))
    expected = local_state(recipe, tmp_path / "local")
    assert found.round == 4
    assert torch.equal(found.row, expected.row)
    assert found.residual.keys() == expected.residual.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["round"] for line in lines] == [-1, 0, 1, 2, 3]


def test_a_codec_of_two_bytes_halves_what_travels(home):
    sizes = {}
    for codec in ("fp32", "bf16"):
        recipe = tiny_recipe(home, **{"method.name": "fedit", "round.codec": codec, "rounds": 1})
        server, clients = (build_experiment(recipe, Observer()) for _ in range(2))
        grid = FakeGrid(recipe_nodes(clients))
        genuine, replies = grid.handlers[993], []

        def kept(message, context, genuine=genuine, replies=replies):
            replies.append(genuine(message, context))
            return replies[-1]

        grid.handlers[993] = kept
        RecipeStrategy(server).start(grid, to_arrays(model_tensors(server)), num_rounds=1)
        arrays = replies[-1].content["arrays"]
        sizes[codec] = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays.values())
    assert sizes["bf16"] * 2 == sizes["fp32"]


def test_what_a_client_keeps_is_of_one_run():
    state = RecordDict()
    ClientMemory(torch.ones(3), {"own": torch.zeros(2)}).write(state, "1")
    assert torch.equal(ClientMemory.read(state, "1").row, torch.ones(3))
    assert ClientMemory.read(state, "2") == ClientMemory()
    # The next run's memory holds nothing of it.
    ClientMemory(torch.zeros(3)).write(state, "2")
    assert ClientMemory.read(state, "2").own == {}


def test_a_client_of_another_recipe_is_told_so(home):
    server = build_experiment(tiny_recipe(home, **{"method.name": "ffa"}), Observer())
    clients = build_experiment(tiny_recipe(home, **{"method.name": "fedit"}), Observer())
    strategy = RecipeStrategy(server)
    strategy.start(FakeGrid(recipe_nodes(clients)), to_arrays(model_tensors(server)), num_rounds=1)
    reasons = {d["reason"] for d in strategy.state.record["dropped"]}
    assert reasons == {
        "its node sent an error: the server runs ffa, this client's recipe says fedit; "
        "give both the same recipe"
    }
