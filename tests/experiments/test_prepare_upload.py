import json

import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.federation.state import latest_state, read_state
from fedcore.methods import Upload
from fedcore.methods.base import Method
from fedcore.methods.lora import fedrot
from fedcore.methods.lora.fedit import FedIT
from fedcore.methods.lora.ffa import FFA
from tests.experiments.jobs import tiny_recipe


def final(folder):
    return read_state(latest_state(folder / "state"))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


class StopBefore(Observer):
    """Ends the run, as a signal would, when ``round`` begins."""

    def __init__(self, round: int) -> None:
        self.round = round

    def round_started(self, round: int, clients: int, steps: int) -> None:
        if round == self.round:
            raise KeyboardInterrupt


def test_the_hook_sees_what_was_trained_and_decides_what_is_sent(home, tmp_path, monkeypatch):
    seen = []

    def doubled(self, row, layout, broadcast, round):
        seen.append((round, row.clone(), layout, broadcast.row.clone()))
        return Upload(2 * row, ("doubled",))

    recipe = tiny_recipe(home, rounds=1, **{"method.name": "fedit"})
    start(recipe, tmp_path / "plain")
    monkeypatch.setattr(FedIT, "prepare_upload", doubled)
    start(recipe, tmp_path / "run")
    first, last = read_state(tmp_path / "run/state/round-0000"), final(tmp_path / "run")
    assert [round for round, *_ in seen] == [0] * 4
    for _, row, layout, before in seen:
        assert layout == first.layout
        assert torch.equal(before, first.row)
        assert not torch.equal(row, first.row)
    torch.testing.assert_close(last.row, 2 * final(tmp_path / "plain").row)
    plain, run = records(tmp_path / "plain"), records(tmp_path / "run")
    assert plain[1]["flags"] == []
    assert run[1]["flags"] == [f"client-{n:02d}: doubled" for n in range(4)]
    assert run[1]["bytes_up"] == plain[1]["bytes_up"]
    assert run[1]["clients"][0]["local_accuracy"] == plain[1]["clients"][0]["local_accuracy"]


def test_the_default_sends_the_trained_row_itself():
    row = torch.tensor([1.0, -0.0])
    layout = broadcast = None
    upload = Method.prepare_upload(FedIT(), row, layout, broadcast, 3)
    assert upload.row is row
    assert upload.flags == ()


def test_frozen_factors_are_compared_as_the_client_holds_them(home, tmp_path, monkeypatch):
    def scribble(self, row, layout, broadcast, round):
        assert {slot.factor for slot in layout.factor_slots} == {"B"}
        return Upload(row + 1)

    monkeypatch.setattr(FFA, "prepare_upload", scribble)
    start(tiny_recipe(home, rounds=1, **{"method.name": "ffa"}), tmp_path / "run")
    before, after = read_state(tmp_path / "run/state/round-0000"), final(tmp_path / "run")
    for slot in before.layout.factor_slots:
        was, now = before.layout.view(before.row, slot), after.layout.view(after.row, slot)
        assert torch.equal(was, now) == (slot.factor == "A")


@pytest.mark.parametrize("reference", ["alternate", "both"])
def test_clients_turn_by_the_server_round_also_after_a_restart(
    reference, home, tmp_path, monkeypatch
):
    genuine, turns = fedrot.rotations, []

    def spy(stacks, references, strength):
        found = genuine(stacks, references, strength)
        angle = float((found.rotation - torch.eye(2, dtype=torch.float64)).abs().max())
        used = "".join(f for f, goal in zip("BA", references, strict=True) if goal is not None)
        turns.append((used, angle > 1e-5))
        return found

    monkeypatch.setattr(fedrot, "rotations", spy)
    settings = {"method.name": "fedrot", "method.reference": reference, "optimiser.state": "keep"}
    recipe = tiny_recipe(home, rounds=4, **settings)
    start(recipe, tmp_path / "whole")
    # All modules of the tiny model have one shape: one call a client, none in round 0.
    by_a, by_b, by_both = ("A", True), ("B", True), ("BA", True)
    per_round = [by_a, by_b, by_a] if reference == "alternate" else [by_both] * 3
    assert turns == [trained for trained in per_round for _ in range(4)]
    turns.clear()
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "cut", StopBefore(2))
    turns.clear()
    resume(tmp_path / "cut")
    assert turns == [trained for trained in per_round[1:] for _ in range(4)]
    whole, cut = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert torch.equal(whole.row, cut.row)
    for client, tensors in whole.simulated_clients.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, cut.simulated_clients[client][name]), (client, name)


def test_a_turn_changes_the_upload_and_nothing_the_client_keeps(home, tmp_path):
    runs = {}
    for name, settings in {
        "fedit": {"method.name": "fedit"},
        "still": {"method.name": "fedrot", "method.strength": 0.0},
        "turned": {"method.name": "fedrot", "method.strength": 1.0},
    }.items():
        recipe = tiny_recipe(home, **{"optimiser.state": "keep", **settings})
        start(recipe, tmp_path / name)
        runs[name] = final(tmp_path / name), records(tmp_path / name)[-1]
    plain, record = runs["fedit"]
    assert torch.equal(plain.row, runs["still"][0].row)
    assert not torch.equal(plain.row, runs["turned"][0].row)
    # Round 0 turns nothing, so both runs train from the same state in round 1.
    turned, after = runs["turned"]
    for client, tensors in plain.simulated_clients.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, turned.simulated_clients[client][name]), (client, name)
    assert plain.traffic == turned.traffic
    assert record["train_loss"] == after["train_loss"]
    for one, other in zip(record["clients"], after["clients"], strict=True):
        assert one["local_accuracy"] == other["local_accuracy"]


def test_a_poisoned_client_is_still_refused_by_name(home, tmp_path, monkeypatch):
    from fedcore.experiments import client_round as client_turn

    genuine = client_turn.train_client

    def poisoned(forward, examples, indices, parameters, *rest, **named):
        result = genuine(forward, examples, indices, parameters, *rest, **named)
        poisoned.calls += 1
        if poisoned.calls == 6:
            with torch.no_grad():
                next(iter(parameters.values()))[0] = torch.nan
        return result

    poisoned.calls = 0
    monkeypatch.setattr(client_turn, "train_client", poisoned)
    with pytest.raises(
        FedcoreError, match=r"round 1: client client-01: .*\.A holds \d+ values .* such as nan"
    ):
        start(tiny_recipe(home, **{"method.name": "fedrot"}), tmp_path / "run")
