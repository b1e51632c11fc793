import json

import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments import client_round as client_turn
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import (
    SPENT,
    check_local,
    privacy_record,
    steps_after,
)
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from fedcore.methods.registry import default_methods
from fedcore.privacy.accounting import Spending, epsilon
from tests.experiments.jobs import tiny_recipe

DELTA = 1e-3
NOISY = {
    "privacy.noise_multiplier": 1.5,
    "privacy.noise": "seeded",
    "privacy.delta": DELTA,
    "adapter.layers": [-1],
}
TELLING = [m.name for m in default_methods() if m.capabilities.wants_features]
WHOLE = [m.name for m in default_methods() if m.capabilities.whole_model]
OTHERS = [m.name for m in default_methods() if m.name not in (*TELLING, *WHOLE)]


class Stop(Observer):
    """Ends the run, as a signal would, in the middle of a round's training."""

    def __init__(self, after_steps: int) -> None:
        self.left = after_steps

    def step_done(self, loss: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def last_state(folder):
    return read_state(latest_state(folder / "state"))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_trains_privately(method, home, tmp_path):
    # Krum with one faulty client needs five.
    settings = {"method.name": method, "clients": 5, "rounds": 1, "training.steps": 1}
    summary = start(tiny_recipe(home, **NOISY, **settings), tmp_path / "run")
    assert summary["privacy"]["largest_epsilon"] > 0
    before = read_state(tmp_path / "run/state/round-0000").row
    after = last_state(tmp_path / "run").row
    assert bool(torch.isfinite(after).all())
    if method != "local_only":
        assert not torch.equal(before, after)


@pytest.mark.parametrize("method", WHOLE)
def test_a_method_that_trains_the_whole_model_is_refused_at_once(method, home, tmp_path):
    with pytest.raises(FedcoreError, match=r"trains parameters of every kind.*; use one of head"):
        start(tiny_recipe(home, **NOISY, **{"method.name": method}), tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()


@pytest.mark.parametrize("method", TELLING)
def test_statistics_of_examples_are_not_sent_beside_it(method, home, tmp_path):
    with pytest.raises(FedcoreError, match="sends statistics of the clients' examples"):
        start(tiny_recipe(home, **NOISY, **{"method.name": method}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.autocast": True}, "training.autocast is true"),
        ({"adapter.client_ranks": [1, 2]}, "noise would fill the rows"),
        ({"privacy.delta": 0.05}, r"client-\d\d holds \d+ examples: such a delta permits"),
        (
            {"privacy.noise_multiplier": 0.1, "privacy.accountant": "prv"},
            "the accountant 'prv' goes up to 50",
        ),
        ({"privacy.noise_multiplier": 0}, "privacy.noise_multiplier"),
        ({"privacy.max_grad_norm": -1}, "privacy.max_grad_norm"),
        ({"privacy.accountant": "gdp"}, "privacy.accountant"),
        ({"privacy.noise_multiplyer": 1}, "did you mean privacy.noise_multiplier"),
    ],
)
def test_an_epsilon_that_would_mislead_is_refused(settings, message, home, tmp_path):
    with pytest.raises(FedcoreError, match=message):
        start(tiny_recipe(home, **{**NOISY, **settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_record_holds_what_the_accountant_says_of_every_client(home, tmp_path):
    settings = {**NOISY, "rounds": 3, "round.participation": 0.5, "round.dropout": 0.2}
    del settings["adapter.layers"]
    recipe = tiny_recipe(home, **settings)
    summary = start(recipe, tmp_path / "run")
    experiment = build_experiment(recipe, Observer())
    records = lines(tmp_path / "run")
    assert "privacy" not in records[0]
    turns = dict.fromkeys(experiment.shards, 0)
    for record in records[1:]:
        gone = {d["client"] for d in record["dropped"]}
        for client in set(record["sampled"]) - gone:
            turns[client] += 1
        found = record["privacy"]
        assert found["steps"] == {client: 2 * count for client, count in turns.items()}
        for client, indices in experiment.shards.items():
            spending = Spending(1.5, min(1.0, 8 / len(indices)), 2 * turns[client])
            assert found["epsilon"][client] == epsilon(spending, DELTA)
    assert len(set(turns.values())) > 1
    largest = max(found["epsilon"].values())
    assert summary["privacy"]["largest_epsilon"] == largest
    assert found["epsilon"][summary["privacy"]["largest_epsilon_client"]] == largest
    assert (summary["privacy"]["delta"], summary["privacy"]["accountant"]) == (DELTA, "rdp")


def test_the_numeric_accountant_says_less(home):
    spent = {"client-00": {SPENT: torch.tensor(6)}}
    found = {}
    for accountant in ("rdp", "prv"):
        recipe = tiny_recipe(home, **NOISY, **{"privacy.accountant": accountant})
        found[accountant] = privacy_record(recipe, {"client-00": 20, "client-01": 20}, spent)
        assert found[accountant].epsilon["client-01"] == 0
    assert 0 < found["prv"].epsilon["client-00"] < found["rdp"].epsilon["client-00"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"method.name": "florg", "optimiser.state": "keep"}, 5),
        ({"method.name": "florg", "optimiser.state": "keep"}, 9),
        ({"method.name": "flora"}, 0),
        ({"method.name": "fedsa", "round.participation": 0.5}, 5),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(settings, steps, home, tmp_path):
    recipe = tiny_recipe(home, **NOISY, **settings)
    start(recipe, tmp_path / "whole")
    try:
        start(recipe, tmp_path / "cut", Stop(steps))
    except KeyboardInterrupt:
        assert not (tmp_path / "cut/summary.json").exists()
    resume(tmp_path / "cut")
    whole, cut = last_state(tmp_path / "whole"), last_state(tmp_path / "cut")
    assert torch.equal(whole.row, cut.row)
    for client, tensors in whole.simulated_clients.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, cut.simulated_clients[client][name]), (client, name)
    spent = [[line.get("privacy") for line in lines(tmp_path / run)] for run in ("whole", "cut")]
    assert spent[0] == spent[1]


def test_noise_is_secret_where_it_is_asked_for(home, tmp_path):
    rows = {}
    for name, noise in (("a", "seeded"), ("b", "seeded"), ("c", "secret"), ("d", "secret")):
        recipe = tiny_recipe(home, **{**NOISY, "privacy.noise": noise, "rounds": 1})
        start(recipe, tmp_path / name)
        rows[name] = last_state(tmp_path / name).row
    assert torch.equal(rows["a"], rows["b"])
    assert not torch.equal(rows["a"], rows["c"])
    assert not torch.equal(rows["c"], rows["d"])


def test_clients_and_rounds_draw_noise_of_their_own(home, tmp_path, monkeypatch):
    genuine, seeds = client_turn.train_privately, []

    def recorded(*arguments, **named):
        seeds.append(named["seed"])
        return genuine(*arguments, **named)

    monkeypatch.setattr(client_turn, "train_privately", recorded)
    start(tiny_recipe(home, **NOISY), tmp_path / "run")
    assert len(seeds) == len(set(seeds)) == 2 * 4


def test_more_noise_changes_the_model_and_no_noise_multiplier_leaves_it(home, tmp_path):
    rows = {}
    for name, settings in {
        "plain": {},
        "delta alone": {"privacy.delta": DELTA},
        "some": NOISY,
        "more": {**NOISY, "privacy.noise_multiplier": 3.0},
        "other bound": {**NOISY, "privacy.max_grad_norm": 0.1},
    }.items():
        summary = start(tiny_recipe(home, rounds=1, **settings), tmp_path / name)
        assert (summary["privacy"] is None) == (name in ("plain", "delta alone"))
        assert (SPENT in last_state(tmp_path / name).simulated_clients.get("client-00", {})) == (
            summary["privacy"] is not None
        )
        rows[name] = last_state(tmp_path / name).row
    assert torch.equal(rows["plain"], rows["delta alone"])
    different = [rows[name] for name in ("plain", "some", "more", "other bound")]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_frozen_factors_stay_as_they_were_sent(home, tmp_path):
    start(tiny_recipe(home, **NOISY, **{"method.name": "ffa", "rounds": 1}), tmp_path / "run")
    before, after = read_state(tmp_path / "run/state/round-0000"), last_state(tmp_path / "run")
    for slot in before.layout.factor_slots:
        same = torch.equal(before.layout.view(before.row, slot), after.layout.view(after.row, slot))
        assert same == (slot.factor == "A"), slot.name


def test_the_cached_prefix_does_not_change_a_private_run(home, tmp_path):
    rows = []
    for reuse in (True, False):
        settings = {"training.reuse_prefix": reuse}
        start(tiny_recipe(home, **NOISY, **settings), tmp_path / str(reuse))
        rows.append(last_state(tmp_path / str(reuse)).row)
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-5)


def test_one_holder_of_all_data_spends_for_all_steps(home, tmp_path):
    settings = {**NOISY, "method.name": "centralised"}
    summary = start(tiny_recipe(home, **settings), tmp_path / "run")
    assert summary["privacy"]["steps"] == {"everyone": 2 * 4 * 2}


@pytest.mark.parametrize("key", ["privacy.noise_multiplier", "privacy.central.noise_multiplier"])
def test_engines_that_report_more_are_refused(key, home):
    check_local(tiny_recipe(home), "Flower")
    with pytest.raises(FedcoreError, match="clients of Flower report their training loss"):
        check_local(tiny_recipe(home, **{key: 1.0}), "Flower")


def test_steps_add_up():
    assert int(steps_after({}, 3)) == 3
    assert int(steps_after({SPENT: torch.tensor(4)}, 3)) == 7
