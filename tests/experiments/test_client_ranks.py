"""Clients of different rank in one run."""

import json
import re

import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.federation.state import latest_state, read_state
from tests.experiments.jobs import tiny_recipe

MIXED = {"adapter.rank": 4, "adapter.client_ranks": [4, 1, 2]}


@pytest.mark.parametrize("method", ["ffa", "florg.whitened", "flora"])
def test_lower_ranks_train_upload_and_count_as_such(method, home, tmp_path, monkeypatch):
    from fedcore.experiments import round as round_room

    cohorts = []
    genuine = round_room.train_clients

    def recorded(experiment, opened, *others):
        trained, close = genuine(experiment, opened, *others), opened.close

        def closing(aggregation, **options):
            closed = close(aggregation, **options)
            cohorts.append(trained.factors or closed.cohort)
            return closed

        monkeypatch.setattr(opened, "close", closing)
        return trained

    monkeypatch.setattr(round_room, "train_clients", recorded)
    chosen = {"method.name": method}
    recipe = tiny_recipe(home, **MIXED, **chosen)
    mixed = start(recipe, tmp_path / "run")
    assert mixed["finished"]
    assert len(cohorts) == recipe.rounds
    for cohort in cohorts:
        # Four clients take the three ranks in turn, the fourth the first again.
        assert cohort.ranks[:, 0].tolist() == [4, 1, 2, 4]
        for slot in cohort.layout.factor_slots:
            for n, rank in enumerate([4, 1, 2, 4]):
                assert not bool(cohort.layout.view(cohort.updates[n], slot)[rank:].any())
    full = start(tiny_recipe(home, **{"adapter.rank": 4}, **chosen), tmp_path / "full")
    # Statistics have the broadcast's shape whatever the rank.
    share = 16 if method == "florg.whitened" else 4 + 1 + 2 + 4
    assert mixed["bytes_up"]["adapter"] * 16 == full["bytes_up"]["adapter"] * share


@pytest.mark.parametrize("method", ["product_svd", "florg"])
def test_an_interrupted_run_of_mixed_ranks_ends_with_the_same_bits(method, home, tmp_path):
    class StopAfter(Observer):
        left = 9

        def step_done(self, loss):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    recipe = tiny_recipe(home, **MIXED, **{"method.name": method, "rounds": 3})
    start(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "cut", StopAfter())
    resume(tmp_path / "cut")
    whole, cut = (read_state(latest_state(tmp_path / n / "state")) for n in ("whole", "cut"))
    assert torch.equal(whole.row, cut.row)


@pytest.mark.parametrize("method", ["fedit", "florg.avg_a", "fed_sb"])
def test_methods_that_need_equal_ranks_say_so_before_anything_runs(method, home, tmp_path):
    recipe = tiny_recipe(home, **MIXED, **{"method.name": method})
    message = (
        rf"is \[4, 1, 2\]: {re.escape(method)}.* needs equal ranks; .*give all clients one rank$"
    )
    with pytest.raises(FedcoreError, match=message):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [[5], [0], [2, 9]])
def test_ranks_beyond_the_servers_are_no_recipe(ranks, home):
    with pytest.raises(FedcoreError, match="client_ranks"):
        tiny_recipe(home, **{"adapter.rank": 4, "adapter.client_ranks": ranks})


def test_a_lower_rank_is_the_best_of_its_rank_under_product_svd(home, tmp_path, monkeypatch):
    from fedcore.experiments import round as round_room

    seen = {}
    genuine = round_room.lower_rank_starts

    def recorded(state, *others):
        starts = genuine(state, *others)
        seen.update({(state.round, client): (state, row) for client, row in starts.items()})
        return starts

    monkeypatch.setattr(round_room, "lower_rank_starts", recorded)
    start(tiny_recipe(home, **MIXED, **{"method.name": "product_svd"}), tmp_path / "run")
    state, row = seen[1, "client-02"]
    layout = state.layout
    for module in layout.modules:
        parts = {
            name: {f: layout.view(values, layout.by_name[f"{module}.{f}"]).double() for f in "AB"}
            for name, values in (("global", state.row), ("client", row))
        }
        whole = parts["global"]["B"].T @ parts["global"]["A"]
        own = parts["client"]["B"].T @ parts["client"]["A"]
        tail = torch.linalg.svdvals(whole)[2:].square().sum().sqrt()
        torch.testing.assert_close((whole - own).norm(), tail, rtol=1e-3, atol=1e-7)


def test_the_record_of_a_mixed_run_is_strict_json(home, tmp_path):
    start(tiny_recipe(home, **MIXED, **{"method.name": "ffa"}), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    errors = [m["aggregation_error"] for r in records[1:] for m in r["modules"]]
    assert max(errors) < 1e-6
