"""`fedcore evaluate` as a user meets it, on tiny runs, without a network."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from fedcore.answers.scoring import score_tasks
from fedcore.answers.task import AnswerTask, Row
from fedcore.cli import main
from fedcore.errors import FedcoreError
from fedcore.experiments.answers import run_models
from fedcore.experiments.client_models import client_row
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from tests.experiments.jobs import TOPICS, tiny_causal_recipe, tiny_recipe

WORDS = tuple(f" {word}" for text in TOPICS.values() for word in text.split()[:2])
ROWS = tuple(
    {"prompt": " ".join(text.split()[i : i + 3]), "options": list(WORDS), "answer": 2 * k}
    for k, text in enumerate(TOPICS.values())
    for i in range(4)
)
TASK = AnswerTask(
    "topics", "choice", tuple(Row(r["prompt"], r["answer"], tuple(r["options"])) for r in ROWS)
)


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """The command in this process: its exit status and what it prints, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedcore", "evaluate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """Runs of three methods: one global model, one per client, all data in one place."""
    folder = tmp_path_factory.mktemp("runs")
    fast = {"optimiser.rate": 3e-2, "training.steps": 8}
    for method in ("fedex", "local_only", "centralised"):
        start(tiny_causal_recipe(home, **{"method.name": method, **fast}), folder / method)
    (folder / "topics.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


def test_a_run_is_scored_against_its_base_offline(runs, evaluate, tmp_path):
    run, out = runs / "fedex", tmp_path / "deep" / "answers.json"
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    code, printed, errors = evaluate(run, "--data", runs / "topics.jsonl", "--out", out)
    assert (code, errors) == (0, f"preparing the run in {run}\n")
    *table, last = printed.splitlines()
    assert max(map(len, table)) <= 80
    assert table[0].strip() == "topics (choice)"
    assert last == f"numbers: {out}"
    record = json.loads(out.read_text())["tasks"]["topics"]
    assert list(record["models"]) == ["base", "global"]
    assert record["n"] == len(ROWS)
    # What the command says is what the models of the run say.
    experiment = build_experiment(run_recipe(run), Observer())
    state = read_state(latest_state(run / "state"))
    assert state.residual
    experiment.residual.load(state.residual)
    experiment.binding.load(state.row)
    (trained,) = score_tasks(experiment.model, experiment.tokenizer, [TASK])
    assert record["models"]["global"]["acc"]["rows"] == list(trained.rows["acc"])
    experiment.residual.load({})
    with experiment.model.disable_adapter():
        (base,) = score_tasks(experiment.model, experiment.tokenizer, [TASK])
    assert record["models"]["base"]["acc"]["rows"] == list(base.rows["acc"])
    assert base.rows != trained.rows
    for model in ("base", "global"):
        value = record["models"][model]["acc"]["value"]
        assert re.search(rf"{model} +acc +{value:.3f}", printed)
    # The run is left as it was.
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


def run_recipe(run):
    from fedcore.recipes import load_recipe

    return load_recipe(run / "recipe.toml")


def test_the_order_of_the_models_does_not_matter(runs):
    candidates = run_models(runs / "fedex").candidates
    scores = candidates.score([TASK])
    turned = replace(candidates, rows=tuple(reversed(candidates.rows))).score([TASK])
    assert list(turned) == ["global", "base"]
    for name, (score,) in scores.items():
        assert turned[name][0].rows == score.rows


def test_a_round_is_chosen(runs):
    first = run_models(runs / "fedex", round=0).candidates.score([TASK])
    assert first["base"][0].rows == first["global"][0].rows
    with pytest.raises(FedcoreError, match="has no state of round 9; it has those of rounds 0 to"):
        run_models(runs / "fedex", round=9)


def test_clients_with_models_of_their_own_are_scored_by_their_mean(runs):
    models = run_models(runs / "local_only", clients=True)
    scores = models.candidates.score([TASK])
    clients = ["client-00", "client-01", "client-02"]
    assert list(scores) == ["base", "local-only, mean", *clients]
    rows = [scores[client][0].rows["acc"] for client in clients]
    assert len(set(rows)) > 1
    means = [sum(row) / 3 for row in zip(*rows, strict=True)]
    assert scores["local-only, mean"][0].rows["acc"] == pytest.approx(means)
    experiment = build_experiment(run_recipe(runs / "local_only"), Observer())
    state = read_state(latest_state(runs / "local_only" / "state"), clients=True)
    experiment.binding.load(client_row(experiment, state, clients[1]))
    (one,) = score_tasks(experiment.model, experiment.tokenizer, [TASK])
    assert one.rows["acc"] == rows[1]


def test_a_centralised_run_is_called_so(runs):
    assert [row.name for row in run_models(runs / "centralised").candidates.rows] == [
        "base",
        "centralised",
    ]
    with pytest.raises(FedcoreError, match="clients of fedex share one model; leave it out"):
        run_models(runs / "fedex", clients=True)


def test_held_out_texts_are_not_among_the_trained(runs):
    models = run_models(runs / "fedex")
    experiment = build_experiment(run_recipe(runs / "fedex"), Observer())
    read = {" ".join(t.split()) for t in models.trained}
    held = {
        experiment.tokenizer.decode(experiment.examples.input_ids[i], skip_special_tokens=True)
        for i in experiment.test.tolist()
    }
    assert len(read) == 90 - len(experiment.test)
    assert not read & {" ".join(t.split()) for t in held}


def test_the_adapter_of_a_run_needs_no_run(runs, home, evaluate, tmp_path):
    # The residual of the run is in it.
    adapter, data, out = runs / "fedex" / "adapter", runs / "topics.jsonl", tmp_path / "a.json"
    done = evaluate(adapter, "--base", home / "language-model", "--data", data, "--out", out)
    assert done[0] == 0, done
    alone = json.loads(out.read_text())["tasks"]["topics"]["models"]
    whole = run_models(runs / "fedex").candidates.score([TASK])
    assert alone["adapter"]["acc"]["rows"] == list(whole["global"][0].rows["acc"])
    assert alone["base"]["acc"]["rows"] == list(whole["base"][0].rows["acc"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fedex", "--base", "x"], "--base does not fit"),
        (["fedex/adapter", "--round", "1"], "--round does not fit"),
        (["fedex/adapter", "--clients"], "--clients does not fit"),
        (["fedex/state"], "is neither a run (recipe.toml) nor an adapter"),
        (
            ["fedex", "--tasks", "arithmetics"],
            "unknown task 'arithmetics'; did you mean arithmetic",
        ),
        (["fedex", "--tasks", "arithmetic,arithmetic"], "two tasks are called 'arithmetic'"),
        (["fedex", "--stop", "x"], "--kind and --stop belong to --data"),
        (["fedex", "--data", "absent.jsonl"], "there is no file absent.jsonl"),
        (["classifier", "--tasks", "arithmetic"], "is a run of task 'classification'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    arguments, said, runs, home, evaluate, monkeypatch
):
    if arguments[0] == "classifier" and not (runs / "classifier").exists():
        start(tiny_recipe(home, rounds=1), runs / "classifier")
    monkeypatch.chdir(runs)
    code, printed, errors = evaluate(*arguments)
    assert (code, printed) == (2, "")
    assert said in errors
    assert errors.splitlines()[-1].startswith("fedcore: ")
    assert errors.count("\n") <= 2


def test_another_base_is_refused(runs, home, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "home"
    shutil.copytree(home / "language-model", folder / "language-model")
    shutil.copy(home / "stories.csv", folder / "stories.csv")
    start(tiny_causal_recipe(folder, rounds=1, **{"method.name": "fedit"}), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(folder / "language-model")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    model.save_pretrained(folder / "language-model")
    with pytest.raises(FedcoreError, match="cannot be evaluated: its base differs from the run's"):
        run_models(tmp_path / "run")
