import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments.run import run_trials, start
from fedcore.experiments.trials import plan_trials
from fedcore.federation.state import latest_state, read_state
from fedcore.recipes import to_toml
from tests.experiments.jobs import tiny_recipe


@pytest.fixture
def recipe_file(home, tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(to_toml(tiny_recipe(home, rounds=1, **{"adapter.layers": [-1]})))
    return file


def test_every_combination_is_planned_once(recipe_file):
    trials = plan_trials(recipe_file, ["florg", "fedit", "FLoRG"], [0, 1], {"clients": [2, 3]})
    assert len(trials) == len({t.folder for t in trials}) == 8
    assert {(t.recipe.clients, t.recipe.seed, t.method) for t in trials} == {
        (c, s, m) for c in (2, 3) for s in (0, 1) for m in ("florg.truncated", "fedit")
    }


@pytest.mark.parametrize(
    ("methods", "vary", "message"),
    [
        (["fedt"], {}, "did you mean .*fedit"),
        (["fedit"], {"cilents": [2]}, "did you mean clients"),
        (["fedit"], {"clients": [2, 0]}, "clients"),
        ([], {}, "at least one method"),
    ],
)
def test_mistakes_are_found_before_anything_trains(recipe_file, methods, vary, message):
    with pytest.raises(FedcoreError, match=message):
        plan_trials(recipe_file, methods, [0], vary)


def test_runs_that_share_texts_and_prefix_equal_runs_that_do_not(recipe_file, tmp_path):
    trials = plan_trials(recipe_file, ["florg", "ffa"], [0, 1])
    for trial, summary in run_trials(trials, tmp_path / "all"):
        alone = start(trial.recipe, tmp_path / "alone" / trial.folder)
        assert summary["accuracy"] == alone["accuracy"]
        rows = [
            read_state(latest_state(tmp_path / where / trial.folder / "state")).row
            for where in ("all", "alone")
        ]
        assert torch.equal(*rows)


def test_an_interrupted_comparison_goes_on_and_others_are_refused(recipe_file, tmp_path):
    trials = plan_trials(recipe_file, ["ffa"], [0, 1])
    next(run_trials(trials, tmp_path / "out"))
    done = [summary["seed"] for _, summary in run_trials(trials, tmp_path / "out")]
    assert done == [0, 1]
    other = plan_trials(recipe_file, ["ffa"], [0], None, {"clients": 2})
    with pytest.raises(FedcoreError, match="holds a run of another recipe"):
        list(run_trials(other, tmp_path / "out"))
