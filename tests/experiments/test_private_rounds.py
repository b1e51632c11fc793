import json
from itertools import pairwise
from math import sqrt

import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.round import sample_clients
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from fedcore.methods import METHODS
from fedcore.privacy.accounting import Spending, epsilon
from tests.experiments.jobs import tiny_recipe

NOISY = {
    "privacy.central.noise_multiplier": 1.5,
    "privacy.noise": "seeded",
    "privacy.delta": 1e-3,
    "round.weighting": "uniform",
    "adapter.layers": [-1],
    "training.steps": 1,
}


def last_row(folder):
    return read_state(latest_state(folder / "state")).row


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_methods_run_under_it_or_say_why_not(method, home, tmp_path):
    recipe = tiny_recipe(home, **NOISY, **{"method.name": method, "rounds": 1, "clients": 5})
    runs = ("fedit", "ffa", "rolora", "fedsa", "florg.avg_a", "fedrot", "fed_sb", "head_only")
    runs = (*runs, "fedavg.full")
    if method not in runs:
        with pytest.raises(FedcoreError, match=r"mean of what was trained: .*; use one of fedit"):
            start(recipe, tmp_path / "run")
        return
    summary = start(recipe, tmp_path / "run")
    assert summary["central_privacy"]["epsilon"] == epsilon(Spending(1.5, 1.0, 1), 1e-3)
    assert not torch.equal(
        read_state(tmp_path / "run/state/round-0000").row, last_row(tmp_path / "run")
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round.weighting": "examples"}, "clients of equal weight"),
        ({"round.secure_sum": True}, "hides the single uploads"),
        ({"adapter.client_ranks": [1, 2]}, "has no update to clip"),
        ({"privacy.delta": 0.3}, "permits revealing one of them"),
        ({"privacy.central.max_norm": 0}, "privacy.central.max_norm"),
    ],
)
def test_rounds_that_are_another_mechanism_are_refused(settings, message, home, tmp_path):
    recipe_settings = {**NOISY, "method.name": "ffa", **settings}
    with pytest.raises(FedcoreError, match=message):
        start(tiny_recipe(home, **recipe_settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_round_spends_also_one_without_clients(home, tmp_path):
    settings = {**NOISY, "method.name": "fedit", "rounds": 4, "round.participation": 0.3}
    summary = start(tiny_recipe(home, **settings), tmp_path / "run")
    records = lines(tmp_path / "run")[1:]
    sizes = {len(record["sampled"]) for record in records}
    assert len(sizes) > 1
    for done, record in enumerate(records, start=1):
        assert record["central_privacy"]["epsilon"] == epsilon(Spending(1.5, 0.3, done), 1e-3)
    assert summary["central_privacy"] == records[-1]["central_privacy"]
    assert "privacy" not in records[-1]


def test_clients_are_drawn_on_their_own(home):
    settings = {**NOISY, "method.name": "ffa", "round.participation": 0.5}
    experiment = build_experiment(tiny_recipe(home, **settings), Observer())
    drawn = [sample_clients(experiment, t) for t in range(200)]
    assert drawn[3] == sample_clients(experiment, 3)
    assert {len(sample) for sample in drawn} == {0, 1, 2, 3, 4}
    for client in experiment.trainers:
        assert 70 <= sum(client in sample for sample in drawn) <= 130


def test_the_expected_number_of_clients_divides_also_where_nobody_came(home, tmp_path):
    settings = {**NOISY, "method.name": "ffa", "round.participation": 1e-3, "rounds": 2}
    start(tiny_recipe(home, **settings), tmp_path / "run")
    assert [line["sampled"] for line in lines(tmp_path / "run")[1:]] == [[], []]
    states = [read_state(tmp_path / f"run/state/round-000{t}") for t in range(3)]
    moves = [after.row - before.row for before, after in pairwise(states)]
    layout, found = states[0].layout, [[], []]
    for slot in layout:
        for values, move in zip(found, moves, strict=True):
            view = layout.view(move, slot)
            assert bool(view.any()) == (slot.factor != "A"), slot.name
            values += view[view != 0].tolist()
    noise = torch.tensor(found)
    expected = 1.5 * 1.0 / (1e-3 * 4)
    assert float(noise.std()) == pytest.approx(expected, rel=6 / sqrt(2 * noise.numel()))
    # Rounds draw noise of their own.
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 6 / sqrt(noise.shape[1])


def test_with_little_noise_and_a_wide_bound_it_is_the_method_itself(home, tmp_path):
    quiet = {**NOISY, "privacy.central.noise_multiplier": 1e-9, "privacy.central.max_norm": 1e3}
    plain = {k: v for k, v in NOISY.items() if not k.startswith("privacy")}
    start(tiny_recipe(home, **quiet, **{"method.name": "fedit"}), tmp_path / "quiet")
    start(tiny_recipe(home, **plain, **{"method.name": "fedit"}), tmp_path / "plain")
    rows = [last_row(tmp_path / name) for name in ("quiet", "plain")]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


def test_noise_repeats_unless_it_is_secret(home, tmp_path):
    rows = {}
    for name, noise in (("a", "seeded"), ("b", "seeded"), ("c", "secret")):
        settings = {**NOISY, "method.name": "head_only", "rounds": 1, "privacy.noise": noise}
        start(tiny_recipe(home, **settings), tmp_path / name)
        rows[name] = last_row(tmp_path / name)
    assert torch.equal(rows["a"], rows["b"])
    assert not torch.equal(rows["a"], rows["c"])


def test_an_interrupted_run_ends_with_the_same_bits_and_epsilon(home, tmp_path):
    settings = {**NOISY, "method.name": "fedsa", "round.participation": 0.7, "rounds": 3}
    recipe = tiny_recipe(home, **settings, **{"optimiser.state": "keep"})
    start(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "cut", Stop(3))
    resume(tmp_path / "cut")
    assert torch.equal(last_row(tmp_path / "whole"), last_row(tmp_path / "cut"))
    kept = [
        [(line.get("central_privacy"), line["sampled"]) for line in lines(tmp_path / run)]
        for run in ("whole", "cut")
    ]
    assert kept[0] == kept[1]


class Stop(Observer):
    """Ends the run, as a signal would, in the middle of a round's training."""

    def __init__(self, after_steps: int) -> None:
        self.left = after_steps

    def step_done(self, loss: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
