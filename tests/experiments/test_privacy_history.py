"""Epsilon counts what happened, whatever the recipe says afterwards."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.experiments.privacy import SPENT, central_record, privacy_record
from fedcore.experiments.run import resume, start
from fedcore.federation.records import CentralPrivacySpent, NoisySteps, PrivacySpent
from fedcore.privacy.accounting import Spending, epsilon
from fedcore.recipes import load_recipe
from tests.experiments.jobs import tiny_recipe
from tests.experiments.test_damaged_runs import StopAfter, unsealed

DELTA = 1e-3
COMMON: dict[str, Any] = {
    "privacy.noise": "seeded",
    "privacy.delta": DELTA,
    "adapter.layers": [-1],
    "training.steps": 1,
    "rounds": 4,
    "clients": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "clients": {**COMMON, "method.name": "ffa", "privacy.noise_multiplier": 0.6},
    "server": {
        **COMMON,
        "method.name": "ffa",
        "round.weighting": "uniform",
        "privacy.central.noise_multiplier": 0.6,
    },
}


def record_of(run: Path, kind: str) -> Any:
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["privacy" if kind == "clients" else "central_privacy"]


def stopped(kind: str, home: Path, run: Path, after: int = 2) -> Path:
    with suppress(KeyboardInterrupt):
        start(tiny_recipe(home, **KINDS[kind]), run, StopAfter(after))
    return run


def edited(run: Path, old: str, new: str) -> None:
    file = run / "recipe.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_recipe_edited_between_rounds_is_refused(kind: str, home: Path, tmp_path: Path) -> None:
    run = stopped(kind, home, tmp_path / "run")
    edited(run, "noise_multiplier = 0.6", "noise_multiplier = 6.0")
    with pytest.raises(FedcoreError, match=r"recipe.toml was edited after the run began; restore"):
        resume(run)


@pytest.mark.parametrize("kind", list(KINDS))
def test_where_nothing_shows_the_edit_epsilon_still_counts_what_happened(
    kind: str, home: Path, tmp_path: Path
) -> None:
    """A run of version 0.1, which kept no hashes and no history."""
    run = stopped(kind, home, tmp_path / "run")
    before = record_of(run, kind)
    unsealed(run)
    for file in run.glob("state/*/state.json"):
        about = json.loads(file.read_text())
        for name in ("privacy", "central_privacy"):
            about["record"].get(name, {}).pop("history", None)
        file.write_text(json.dumps(about))
    edited(run, "noise_multiplier = 0.6", "noise_multiplier = 6.0")
    resume(run)
    after = record_of(run, kind)
    if kind == "server":
        spent = [Spending(0.6, 1.0, 2), Spending(6.0, 1.0, 2)]
        assert after["epsilon"] == epsilon(spent, DELTA) > before["epsilon"]
        return
    for client, (first, second) in after["history"].items():
        rate = first["sampling_rate"]
        assert (first["noise_multiplier"], first["steps"]) == (0.6, 2)
        assert (second["noise_multiplier"], second["steps"]) == (6.0, 2)
        spent = [Spending(0.6, rate, 2), Spending(6.0, rate, 2)]
        assert after["epsilon"][client] == epsilon(spent, DELTA) > before["epsilon"][client]


@pytest.mark.parametrize("kind", list(KINDS))
def test_privacy_is_not_switched_within_a_run(kind: str, home: Path, tmp_path: Path) -> None:
    run = stopped(kind, home, tmp_path / "private", after=1)
    unsealed(run)
    edited(run, "noise_multiplier = 0.6", "")
    with pytest.raises(FedcoreError, match=r"lacks privacy\..*the rounds so far were run with it"):
        resume(run)
    plain = {k: v for k, v in KINDS[kind].items() if "noise_multiplier" not in k}
    open_run = tmp_path / "open"
    with suppress(KeyboardInterrupt):
        start(tiny_recipe(home, **plain), open_run, StopAfter(1))
    unsealed(open_run)
    table = "[privacy.central]" if kind == "server" else "[privacy]"
    edited(open_run, table, f"{table}\nnoise_multiplier = 0.6")
    with pytest.raises(FedcoreError, match=r"has privacy\..*rounds so far were run without it"):
        resume(open_run)


def test_a_round_records_what_was_used(home: Path, tmp_path: Path) -> None:
    start(tiny_recipe(home, **KINDS["server"], **{"round.participation": 0.5}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()][1:]
    for done, line in enumerate(lines, start=1):
        spent = {"noise_multiplier": 0.6, "sampling_rate": 0.5, "steps": done}
        found = line["central_privacy"]
        assert found["history"] == [spent]
        assert (found["max_norm"], found["noise_multiplier"]) == (1.0, 0.6)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["central_privacy"] == lines[-1]["central_privacy"]


noises = st.sampled_from([0.4, 0.8, 1.5, 5.0])


@settings(max_examples=12)
@given(st.lists(st.tuples(noises, st.sampled_from([0.1, 0.5, 1.0])), min_size=1, max_size=6))
def test_rounds_of_any_recipes_compose(home: Path, rounds: list[tuple[float, float]]) -> None:
    recipe = tiny_recipe(home, **KINDS["server"])
    before: CentralPrivacySpent | None = None
    for done, (noise, rate) in enumerate(rounds, start=1):
        values = recipe.plain()
        values["privacy"]["central"]["noise_multiplier"] = noise
        values["round"]["participation"] = rate
        now = central_record(type(recipe).model_validate(values), done, before)
        assert now is not None
        assert now.epsilon == pytest.approx(
            epsilon([Spending(n, r, 1) for n, r in rounds[:done]], DELTA), rel=1e-12
        )
        assert before is None or now.epsilon >= before.epsilon
        assert sum(kind.steps for kind in now.history) == now.rounds == done
        # As it is read again from the state.
        before = CentralPrivacySpent.model_validate(json.loads(json.dumps(now.plain())))


@settings(max_examples=12)
@given(st.lists(st.tuples(noises, st.integers(0, 3), st.sampled_from([2, 8, 64])), max_size=6))
def test_steps_of_any_recipes_compose(home: Path, rounds: list[tuple[float, int, int]]) -> None:
    recipe = tiny_recipe(home, **KINDS["clients"])
    before: PrivacySpent | None = None
    spent: list[Spending] = []
    total = 0
    for noise, steps, batch in rounds:
        values = recipe.plain()
        values["privacy"]["noise_multiplier"] = noise
        values["training"]["batch_size"] = batch
        total += steps
        spent.append(Spending(noise, min(1.0, batch / 16), steps))
        private = {"a": {SPENT: torch.tensor(total)}}
        now = privacy_record(
            type(recipe).model_validate(values), {"a": 16, "idle": 16}, private, before
        )
        assert now is not None
        assert now.steps == {"a": total, "idle": 0}
        assert now.epsilon["a"] == pytest.approx(epsilon(spent, DELTA), rel=1e-12)
        assert now.epsilon["idle"] == 0
        before = PrivacySpent.model_validate(json.loads(json.dumps(now.plain())))


def test_steps_that_were_recorded_are_not_taken_back(home: Path) -> None:
    recipe = tiny_recipe(home, **KINDS["clients"])
    now = privacy_record(recipe, {"a": 16}, {"a": {SPENT: torch.tensor(5)}})
    with pytest.raises(FedcoreError, match="a has made 4 noisy steps, fewer than were recorded"):
        privacy_record(recipe, {"a": 16}, {"a": {SPENT: torch.tensor(4)}}, now)
    with pytest.raises(FedcoreError, match="a has made 0 noisy steps"):
        privacy_record(recipe, {"a": 16}, {}, now)


def test_equal_rounds_are_one_entry(home: Path) -> None:
    recipe, before = tiny_recipe(home, **KINDS["server"]), None
    for done in range(1, 50):
        before = central_record(recipe, done, before)
    assert before is not None
    assert before.history == (NoisySteps(noise_multiplier=0.6, sampling_rate=1.0, steps=49),)


def test_noise_is_secret_unless_a_recipe_says_otherwise() -> None:
    assert load_recipe("bbc-news").privacy.noise == "secret"
    assert load_recipe("bbc-news", {"privacy.noise": "seeded"}).privacy.noise == "seeded"
