"""Methods that leave every client with a model of its own, through the whole engine."""

import json

import pytest
import torch

from fedcore.data.peft_files import read_adapter
from fedcore.experiments import round as round_room
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import latest_state, read_state
from tests.experiments.jobs import tiny_recipe

METHODS = ("fedsa", "ce_lora")


def final(run):
    return read_state(latest_state(run / "state"))


def own_rows(state):
    return {client: named["row"] for client, named in state.simulated_clients.items()}


def slot_of(state, row, module, factor):
    return state.layout.view(row, state.layout.by_name[f"{module}.{factor}"])


@pytest.fixture
def uploads(monkeypatch):
    """Every cohort that reaches a server half."""
    seen = []
    genuine = OpenRound.close

    def recorded(opened, *arguments, **named):
        closed = genuine(opened, *arguments, **named)
        seen.append(closed.cohort)
        return closed

    monkeypatch.setattr(OpenRound, "close", recorded)
    return seen


@pytest.mark.parametrize(("method", "shared"), [("fedsa", {"A"}), ("ce_lora", {"R"})])
def test_only_what_is_shared_leaves_a_client(method, shared, home, tmp_path, uploads):
    start(tiny_recipe(home, **{"method.name": method}), tmp_path / "run")
    assert uploads
    for cohort in uploads:
        assert {slot.factor for slot in cohort.layout} == shared
    state = final(tmp_path / "run")
    rows = own_rows(state)
    assert sorted(rows) == [f"client-0{i}" for i in range(4)]
    module = state.layout.modules[0]
    bases = [slot_of(state, row, module, "B") for row in rows.values()]
    assert all(not torch.equal(bases[0], other) for other in bases[1:])
    heads = [state.layout.view(row, state.layout.dense_slots[0]) for row in rows.values()]
    assert all(not torch.equal(heads[0], other) for other in heads[1:])


def test_fedsa_clients_go_on_from_the_common_a_and_their_own_b(home, tmp_path, monkeypatch):
    starts = {}
    genuine = round_room.train_one_client

    def recorded(experiment, broadcast, round, client, row, memory, observer):
        starts[round, client] = (broadcast, row.clone(), dict(memory))
        return genuine(experiment, broadcast, round, client, row, memory, observer)

    monkeypatch.setattr(round_room, "train_one_client", recorded)
    start(tiny_recipe(home, **{"method.name": "fedsa"}), tmp_path / "run")
    for client in ("client-00", "client-03"):
        state, row, memory = starts[1, client]
        own = memory["row"]
        for module in state.layout.modules:
            assert torch.equal(
                slot_of(state, row, module, "A"), slot_of(state, state.row, module, "A")
            )
            assert torch.equal(slot_of(state, row, module, "B"), slot_of(state, own, module, "B"))
            assert bool(slot_of(state, row, module, "B").any())
        for slot in state.layout.dense_slots:
            assert torch.equal(state.layout.view(row, slot), state.layout.view(own, slot))


def test_ce_lora_clients_go_on_from_their_own_mix_of_the_cores(home, tmp_path, uploads):
    from fedcore.methods import Broadcast, create_method

    settings = {"method.name": "ce_lora", "method.min_per_component": 2, "rounds": 1}
    recipe = tiny_recipe(home, **settings)
    start(recipe, tmp_path / "run")
    before = read_state(tmp_path / "run/state/round-0000")
    after = final(tmp_path / "run")
    cohort = uploads[0]
    assert set(cohort.statistics) == set(cohort.client_ids)
    previous = Broadcast(before.layout, before.row)
    expected = create_method("ce_lora", min_per_component=2).aggregate(cohort, previous).personal
    mixes = []
    for client, row in own_rows(after).items():
        mix = after.layout.gather(row, cohort.layout)
        assert torch.equal(mix, expected[client])
        mixes.append(mix)
    assert not torch.equal(mixes[0], mixes[1])


def test_a_client_that_sits_out_keeps_its_model_and_one_that_never_came_has_the_global(
    home, tmp_path
):
    settings = {"method.name": "fedsa", "round.participation": 0.5, "rounds": 2}
    start(tiny_recipe(home, **settings), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    first, second = set(records[1]["sampled"]), set(records[2]["sampled"])
    middle, last = read_state(tmp_path / "run/state/round-0001"), final(tmp_path / "run")
    for client in first - second:
        assert torch.equal(own_rows(middle)[client], own_rows(last)[client])
    assert set(own_rows(last)) == first | second
    assert first != second


@pytest.mark.parametrize("method", METHODS)
def test_every_client_has_an_adapter_and_an_accuracy_of_its_own(method, home, tmp_path):
    summary = start(tiny_recipe(home, **{"method.name": method}), tmp_path / "run")
    folders = [f"adapters/client-0{i}" for i in range(4)]
    assert set(folders) <= set(summary["adapters"])
    state = final(tmp_path / "run")
    for client, folder in zip(sorted(own_rows(state)), folders, strict=True):
        adapter = read_adapter(tmp_path / "run" / folder)
        module = state.layout.modules[0]
        held = slot_of(state, own_rows(state)[client], module, "B").T
        assert torch.equal(adapter.factors[module]["B"], held)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    own = [client["global_accuracy"] for client in records[-1]["clients"]]
    assert summary["worst_client"] == min(own)
    assert summary["mean_client"] == pytest.approx(sum(own) / 4)
    assert records[-1]["modules"] == []


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_with_the_same_bits(method, home, tmp_path):
    class StopAfter(Observer):
        left = 9

        def step_done(self, loss):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    recipe = tiny_recipe(home, **{"method.name": method, "rounds": 3})
    start(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "cut", StopAfter())
    resume(tmp_path / "cut")
    whole, cut = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert torch.equal(whole.row, cut.row)
    for client, row in own_rows(whole).items():
        assert torch.equal(row, own_rows(cut)[client])


def test_statements_about_data_are_traffic_of_the_first_round_only(home, tmp_path):
    settings = {"method.name": "ce_lora", "method.min_per_component": 2}
    start(tiny_recipe(home, **settings), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    # 6 modules with a core of 2 x 2, 4 clients, 4 bytes a number.
    cores = 6 * 4 * 4 * 4
    assert records[2]["bytes_up"]["adapter"] == cores
    assert records[1]["bytes_up"]["adapter"] > cores
    assert records[2]["bytes_down"]["adapter"] == cores
