"""Runs of instruction data: trl trains each client on its own rows, whatever their lengths."""

import csv
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments.answers import run_models
from fedcore.experiments.client_models import TRAINED
from fedcore.experiments.client_round import local_steps, train_one_client
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.experiments.site_check import check_site
from fedcore.federation.state import latest_state, read_state
from fedcore.methods.base import Broadcast
from fedcore.recipes import load_recipe, to_toml, with_settings
from fedcore.reports.page import write_run_page
from fedcore.reports.reading import read_run
from fedcore.training.encoding import IGNORED
from fedcore.training.site_settings import SiteSettings
from tests.experiments.jobs import TOPICS, write_language_model
from tests.processes import ONE_THREAD

MARKER = "season"
"""A word of the texts that nothing but a sample may show."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prompts of one to four words that name a topic, answers of one to three."""
    home = tmp_path_factory.mktemp("sft")
    write_language_model(home / "model")
    generator = torch.Generator().manual_seed(0)
    with open(home / "rows.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["question", "answer", "topic"])
        for i in range(60):
            topic = sorted(TOPICS)[i % 3]
            words = TOPICS[topic].split()
            picks = [words[p] for p in torch.randint(8, (7,), generator=generator)]
            asked, said = 1 + i % 4, 1 + i % 3
            writer.writerow(
                [
                    " ".join([*picks[:asked], str(i % 30)]),
                    "".join(f" {word}" for word in picks[4:][:said]),
                    topic,
                ]
            )
    return home


def job(home, partition="iid", **settings):
    (home / "recipe.toml").write_text("")
    spread = {} if partition is None else {"partition.kind": partition}
    return load_recipe(
        home / "recipe.toml",
        {
            **spread,
            "name": "sums",
            "task": "sft",
            "rounds": 2,
            "clients": 3,
            "model.source": str(home / "model"),
            "model.max_length": 16,
            "data.source": str(home / "rows.csv"),
            "data.format": "prompt_completion",
            "data.columns": {"prompt": "question", "completion": "answer"},
            "adapter.rank": 2,
            "adapter.target_modules": ["q_proj", "v_proj"],
            "method.name": "fedit",
            "optimiser.rate": 1e-2,
            "training.steps": 2,
            "training.batch_size": 4,
            **settings,
        },
    )


class Seen(Observer):
    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)

    def preparing(self, what):
        self.texts.append(what)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_a_run_trains_the_answers_alone_and_says_what_became_of_the_rows(home, tmp_path):
    seen = Seen()
    # A row is a question of 2 to 5 tokens, an answer of 1 to 3, and the end token.
    summary = start(job(home, **{"model.max_length": 8}), tmp_path / "run", seen)
    before, first, second = lines(tmp_path / "run")
    assert summary["finished"]
    assert second["loss"] < first["loss"] < before["loss"]
    rows = {c["client"]: c["rows"] for c in first["clients"]}
    assert set(rows) == {"client-00", "client-01", "client-02"}
    total = {name: sum(counts[name] for counts in rows.values()) for name in rows["client-00"]}
    # Too long are those of four words in the prompt and three in the answer: i = 11, 23, 35, ...
    assert total["read"] == 60
    assert total["dropped"] == 5
    assert total["used"] == 55
    assert total["merged"] == total["truncated"] == 0
    assert total["targets"] == sum(2 + i % 3 for i in range(60) if i % 12 != 11)
    assert all("rows" not in c for c in second["clients"])
    assert [text for text in seen.texts if "rows read" in text] == [
        "60 rows read, 55 used, 5 dropped as too long, 0 with a truncated prompt, 0 with a token "
        f"across the prompt's end; {total['targets']} target tokens"
    ]
    used = {c["client"]: c["examples"] for c in first["clients"]}
    assert (
        sum(used.values()) + len(build_experiment(job(home, **{"model.max_length": 8}), seen).test)
        == 55
    )
    said = " ".join(seen.texts) + (tmp_path / "run" / "metrics.jsonl").read_text()
    assert MARKER not in said
    sample = json.loads((tmp_path / "run" / "sample.json").read_text())
    assert sample["reference"]
    with open(home / "rows.csv", encoding="utf-8") as handle:
        pairs = {(row["question"], row["answer"].strip()) for row in csv.DictReader(handle)}
    assert (sample["prompt"], sample["reference"]) in pairs


def test_only_answers_have_targets(home):
    experiment = build_experiment(job(home), Observer())
    everything = torch.arange(len(experiment.examples))
    inputs, targets = (
        experiment.examples.inputs(everything),
        experiment.examples.targets(everything),
    )
    for i in range(len(everything)):
        length = int(inputs["attention_mask"][i].sum())
        asked = (targets[i] != IGNORED).nonzero().flatten().tolist()
        assert asked == list(range(asked[0], length - 1))
        assert 2 <= len(asked) <= 4
        # The end token is the last target.
        assert int(targets[i, length - 2]) == experiment.tokenizer.eos_token_id


class Killed(Observer):
    def round_finished(self, record):
        if record["round"] == 0:
            raise KeyboardInterrupt


KEPT = {
    "rounds": 3,
    "adapter.dropout": 0.2,
    "optimiser.state": "keep",
    "optimiser.schedule": "cosine",
    "training.accumulation": 2,
}


def adapters(*runs):
    return [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]


def test_an_interrupted_run_resumes_to_the_same_bits(home, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    start(job(home, **KEPT), whole)
    with pytest.raises(KeyboardInterrupt):
        start(job(home, **KEPT), part, Killed())
    assert resume(part)["rounds"] == 3
    first, second = adapters(whole, part)
    assert first == second


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_killed_run_resumes_in_another_process_to_the_same_bits(home, tmp_path):
    recipe, part = job(home, **{**KEPT, "rounds": 12}), tmp_path / "part"
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    environment = {**os.environ, **ONE_THREAD}
    command = [sys.executable, "-c", "from fedcore.cli import main; main()", "run"]
    first = subprocess.Popen(
        [*command, str(tmp_path / "recipe.toml"), "--out", str(part)], env=environment
    )
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until and not (part / "state" / "round-0001").exists():
            assert first.poll() is None
            time.sleep(0.01)
    finally:
        first.kill()
        first.wait()
    assert not (part / "summary.json").exists()
    subprocess.run([*command, "--resume", str(part)], env=environment, check=True, timeout=300)
    start(recipe, tmp_path / "whole")
    first_bytes, second = adapters(tmp_path / "whole", part)
    assert first_bytes == second


@pytest.mark.parametrize(
    "settings",
    [
        {"training.accumulation": 2, "training.checkpointing": True},
        {"training.epochs": 1, "training.steps": None},
    ],
    ids=["in parts", "epochs"],
)
def test_parts_of_a_batch_and_checkpointing_change_no_step(settings, home, tmp_path):
    few = {"rounds": 1, "training.batch_size": 8}
    length = {
        key: value
        for key, value in settings.items()
        if key in ("training.steps", "training.epochs")
    }
    plain = start(job(home, **few, **length), tmp_path / "plain")
    other = start(job(home, **few, **settings), tmp_path / "other")
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "method", ["rolora", "florg", "fed_sb", "fedex", "ffa_lora", "fedavg.full", "fedrot"]
)
def test_methods_of_every_family_train_and_lower_the_loss(method, home, tmp_path):
    # A random model's few factors learn little; those of every layer learn enough to show.
    settings = {"method.name": method, "training.steps": 10, "adapter.rank": 4}
    settings["adapter.target_modules"] = "all-linear"
    start(job(home, **settings), tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_a_base_of_eight_bits_is_trained_beside(home, tmp_path):
    settings = {"model.quantisation": "torchao-int8", "method.name": "fedex"}
    start(job(home, **settings), tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_packed_rows_are_fewer_and_each_is_whole(home):
    recipe = job(home, **{"training.steps": None, "training.batch_size": 2})
    plain = build_experiment(recipe, Observer())
    packed = build_experiment(with_settings(recipe, {"sft": {"packing": True}}), Observer())
    assert local_steps(packed, "client-00") < local_steps(plain, "client-00")
    rows = packed.packed["client-00"]
    lengths = sorted(n for row in rows for n in row["seq_lengths"])
    shard = plain.shards["client-00"]
    assert lengths == sorted(len(plain.examples.input_ids[int(i)]) for i in shard)
    assert max(len(row["input_ids"]) for row in rows) <= 16


def test_weights_are_rows_or_their_targets(home, tmp_path):
    for by in ("examples", "tokens", "uniform"):
        experiment = build_experiment(job(home, **{"round.weighting": by}), Observer())
        client = "client-01"
        shard = experiment.shards[client]
        targets = (experiment.examples.targets(shard) != IGNORED).sum()
        expected = {"examples": len(shard), "tokens": int(targets), "uniform": 1}[by]
        row = experiment.binding.read()
        broadcast = Broadcast(experiment.binding.layout, row)
        trained = train_one_client(experiment, broadcast, 0, client, row, {}, Observer())
        assert trained.weight == experiment.weight(client) == expected


def test_privacy_trains_the_same_rows_in_our_own_loop(home, tmp_path):
    private = {"privacy.noise_multiplier": 0.4, "privacy.noise": "seeded"}
    summary = start(job(home, **private), tmp_path / "run")
    assert summary["privacy"]["largest_epsilon"] > 0
    assert lines(tmp_path / "run")[1]["clients"][0]["rows"]["read"] == 20


def test_a_client_without_a_short_row_is_named(home):
    with pytest.raises(FedcoreError, match=r"rows\.csv:\d+: 55 of 60 rows.* max_length = 4"):
        build_experiment(job(home, **{"model.max_length": 4, "data.overlong": "error"}), Observer())
    long = "\n".join(f"{'win ' * 6}{i}, goal" for i in range(29))
    (home / "few.csv").write_text(f"question,answer\nmatch, goal\n{long}\n")
    few = {"data.source": str(home / "few.csv"), "model.max_length": 8, "clients": 2}
    with pytest.raises(FedcoreError, match=r"client-0\d: none of its 12 training rows is short"):
        build_experiment(job(home, **few, **{"partition.min_examples": 1}), Observer())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"data.text_column": "question"}, "recipe key data.text_column: rows of task 'sft'"),
        ({"data.format": "alpaca"}, r"\[data\]: unknown column of format 'alpaca' 'prompt'"),
        ({"data.loss": "all"}, r"\[data\]: loss is 'all' and format 'prompt_completion'"),
        ({"data.format": "columns", "data.columns": {"prompt": "{q"}}, "not a valid template"),
        (
            {"data.format": "columns", "data.columns": {"prompt": "q"}},
            "columns.completion is not set",
        ),
        (
            {"sft": {"learning_rate": 1.0}},
            "sft.learning_rate is set by fedcore; use optimiser.rate",
        ),
        ({"sft": {"pakcing": True}}, "did you mean sft.packing"),
        ({"training.accumulation": 3}, "pass one that divides it"),
        (
            {"privacy.noise_multiplier": 1.0, "training.checkpointing": True},
            "training.checkpointing: with privacy.noise_multiplier",
        ),
        ({"task": "causal"}, "recipe key data.format: it is for task 'sft'"),
        (
            {
                "task": "causal",
                "data.format": None,
                "data.columns": None,
                "training.accumulation": 1,
            },
            "recipe key training.accumulation",
        ),
        (
            {
                "task": "classification",
                "data.format": None,
                "data.columns": None,
                "round.weighting": "tokens",
            },
            "predicts one class of an example",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_the_recipe_is_read(settings, problem, home):
    with pytest.raises(FedcoreError, match=problem):
        job(home, **settings)


def test_trl_is_missed_by_name_where_clients_train(home, monkeypatch):
    from fedcore.experiments import setup

    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"trl is not installed.*\[llm\]"):
        build_experiment(job(home), Observer())


def test_a_site_knows_before_it_joins_what_becomes_of_its_rows(home):
    deployed = {"data.source": "sites", "round.expected": 1, "evaluation.on": "sites"}
    settings = {**deployed, "model.max_length": 8, "round.weighting": "tokens", "clients": 1}
    recipe = job(home, partition=None, **settings)
    report = check_site(recipe, SiteSettings("clinic", str(home / "rows.csv"), batch_size=2))
    assert (report.rows, report.truncated, report.train + report.test) == (60, 5, 55)
    assert report.overlong.startswith("60 rows read, 55 used, 5 dropped")
    assert max(report.lengths) == 9
    assert report.weight.endswith("target tokens")
    assert report.steps == 2
    with pytest.raises(
        FedcoreError, match=r"batch-size is 3, and training.batch_size is 4; pass one"
    ):
        check_site(recipe, SiteSettings("clinic", str(home / "rows.csv"), batch_size=3))


def test_a_run_is_asked_for_answers_without_what_it_trained_on(home, tmp_path):
    start(job(home, rounds=1, **{"model.max_length": 8}), tmp_path / "run")
    models = run_models(tmp_path / "run")
    experiment = build_experiment(job(home, rounds=1, **{"model.max_length": 8}), Observer())
    assert len(models.trained) == sum(experiment.held.values())
    assert [candidate.name for candidate in models.candidates.rows] == ["base", "global"]


def test_a_run_asks_its_models_when_it_has_ended(home, tmp_path):
    class Counts(Observer):
        def __init__(self):
            self.asked = []

        def answers_counted(self, what, done, total):
            self.asked.append((what, done, total))

    run, seen = tmp_path / "run", Counts()
    settings = {"evaluation.tasks": ["arithmetic"], "evaluation.limit": 6}
    start(job(home, **settings), run, seen)
    record = read_run(run)
    (task,) = record.answers.tasks.values()
    clients = ["client-00", "client-01", "client-02"]
    assert task.names == ("base", "global", *clients)
    assert task.n == 6
    assert task.models["base"]["exact_match"].minus_base is None
    assert len(task.models["client-02"]["exact_match"].rows) == 6
    assert ("client-01: arithmetic", 6, 6) in seen.asked
    # Each client's is what it trained in the last round, before the mean of them.
    state = read_state(latest_state(run / "state"))
    trained = [state.simulated_clients[client][TRAINED] for client in clients]
    assert not any(torch.equal(row, state.row) for row in trained)
    again = run_models(run, clients=True).candidates
    assert tuple(candidate.name for candidate in again.rows) == task.names
    page = write_run_page(run).read_text()
    assert "arithmetic (number)" in page
    assert "client-02" in page


def test_answers_are_those_of_a_run_that_was_not_interrupted(home, tmp_path):
    settings = {"evaluation.tasks": ["arithmetic"], "evaluation.limit": 4}

    class Interrupted(Observer):
        def answers_counted(self, what, done, total):
            raise KeyboardInterrupt

    start(job(home, **settings), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(job(home, **settings), tmp_path / "part", Interrupted())
    resume(tmp_path / "part")
    whole, part = ((tmp_path / run / "answers.json").read_bytes() for run in ("whole", "part"))
    assert whole == part


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        (["arithmetics"], "unknown task 'arithmetics'; did you mean arithmetic"),
        (["arithmetic", "arithmetic"], "two tasks are called 'arithmetic'"),
    ],
)
def test_tasks_are_known_before_the_run_begins(tasks, problem, home, tmp_path):
    with pytest.raises(FedcoreError, match=problem):
        start(job(home, **{"evaluation.tasks": tasks}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
