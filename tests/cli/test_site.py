"""`fedcore site check`: numbers of a site, and nothing of its rows."""

import json

import pytest

from fedcore import cli
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.recipes import to_toml
from tests.experiments.jobs import TOPICS
from tests.experiments.site_jobs import site_recipe, write_site


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("site")
    settings = {"data.source": "sites", "round.expected": 2, "evaluation.on": "sites"}
    recipe = site_recipe(home, **settings, **{"data.labels": sorted(TOPICS)})
    (home / "recipe.toml").write_text(to_toml(recipe))
    file = write_site(home / "own notes.jsonl", 100, 0, "note", "diagnosis")
    words = " ".join(["goal"] * 30)
    with file.open("a") as handle:
        handle.write(json.dumps({"note": words, "diagnosis": "sport"}) + "\n")
        handle.write(json.dumps({"note": words, "diagnosis": "sport"}) + "\n")
    (home / "site.toml").write_text(
        'site = "hospital-a"\ndata = "own notes.jsonl"\ncolumns = "note:text,diagnosis:label"\n'
    )
    return home


def ran(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["fedcore", "site", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_it_says_what_would_be_read_trained_and_uploaded(home, monkeypatch, capsys):
    recipe, file = home / "recipe.toml", home / "own notes.jsonl"
    columns = "note:text,diagnosis:label"
    arguments = ["--recipe", recipe, "--data", file, "--columns", columns, "--site", "hospital-a"]
    assert ran(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert ran(monkeypatch, "--recipe", recipe, "--settings", home / "site.toml") == 0
    assert capsys.readouterr().out == out
    said = dict(
        line.split(maxsplit=1) if "  " not in line else line.split("  ", 1)
        for line in out.splitlines()
    )
    said = {name.strip(): value.strip() for name, value in said.items()}
    assert said["rows"] == "102 read, 1 repeated rows left out"
    assert (said["training rows"], said["held-out rows"]) == ("81", "20")
    # Nine words between [CLS] and [SEP]; thirty in the one that is too long.
    assert said["tokens of a row"] == "11 / 11 / 32 (min/median/max)"
    assert said["truncated rows"] == "1 beyond max_length = 12"
    # Rank 2 on two square layers of width 32 in three blocks, and a head of three classes.
    numbers = 3 * 2 * 2 * (32 + 32) + 3 * 32 + 3
    assert said["trained numbers"] == str(numbers)
    assert said["upload per round"] == f"{4 * numbers} bytes"
    assert all(len(line) <= 80 for line in out.splitlines())
    assert not {*" ".join(TOPICS.values()).split()} & {*out.split()}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "pass --data"),
        (["--data", "own notes.jsonl", "--settings", "site.toml"], "pass --data"),
        (["--settings", "site.toml", "--columns", "a:b"], "put them into the file"),
        (["--data", "own notes.jsonl"], "own notes.jsonl:1: unknown column 'text'"),
        (["--data", "none.jsonl"], "none.jsonl is not a file"),
    ],
)
def test_what_is_wrong_ends_in_one_line(arguments, problem, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert ran(monkeypatch, "--recipe", "recipe.toml", *arguments) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_a_check_builds_what_the_node_builds(home):
    from fedcore.experiments.site_check import check_site
    from fedcore.recipes import load_recipe
    from fedcore.training.site_settings import read_site_settings

    recipe, site = load_recipe(home / "recipe.toml"), read_site_settings(home / "site.toml")
    node = build_experiment(recipe, Observer(), site=site)
    report = check_site(recipe, site)
    assert node.held == {"hospital-a": report.train}
    assert report.steps == 2
