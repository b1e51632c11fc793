"""`fedcore flower-app`: what Flower finds in the folder."""

import tomllib

import pytest

from fedcore.cli import main
from fedcore.recipes import load_recipe, parse_recipe, to_toml
from tests.experiments.jobs import tiny_recipe


@pytest.fixture
def command(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fedcore", "flower-app", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    return run


def test_the_app_holds_the_whole_recipe(command, tmp_path, capsys):
    settings = ("--set", "method.name=rolora", "--set", "clients=3", "--set", "rounds=4")
    folder = tmp_path / "app"
    assert command("bbc-news", folder, "--out", tmp_path / "run", "--timeout", 90, *settings) == 0
    assert "3 clients, 4 rounds" in capsys.readouterr().out
    about = tomllib.loads((folder / "pyproject.toml").read_text())
    app = about["tool"]["flwr"]["app"]
    expected = load_recipe("bbc-news", {"method.name": "rolora", "clients": 3, "rounds": 4})
    assert parse_recipe(app["config"]["recipe"]) == expected
    assert app["config"]["out"] == str(tmp_path / "run")
    assert app["config"]["timeout"] == 90.0
    assert [name.split(">")[0] for name in about["project"]["dependencies"]] == ["flwr"]
    # The components that Flower looks up.
    namespace = {}
    exec(compile((folder / "fedcore_job.py").read_text(), "fedcore_job.py", "exec"), namespace)
    for component in ("server", "client"):
        assert app["components"][f"{component}app"] == f"fedcore_job:{component}"
        assert callable(namespace[component])
    assert (folder / about["project"]["license"]["file"]).is_file()


def test_packages_to_install_are_listed(command, tmp_path):
    folder, packages = tmp_path / "app", ("fedcore-lora[flower]==0.1.0", "our-data")
    given = [part for name in packages for part in ("--install", name)]
    assert command("bbc-news", folder, "--out", tmp_path / "run", *given) == 0
    about = tomllib.loads((folder / "pyproject.toml").read_text())
    assert about["project"]["dependencies"][1:] == list(packages)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.name=fedsa", "fedsa leaves each client a model of its own"),
        ("round.secure_sum=true", "round.secure_sum"),
        ("rounds=0", "rounds"),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_written(
    command, setting, message, tmp_path, capsys
):
    settings = ("--set", "method.name=fedit", "--set", setting)
    assert command("bbc-news", tmp_path / "app", "--out", tmp_path / "run", *settings) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "app").exists()


def test_a_folder_that_holds_something_is_left_alone(command, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(to_toml(tiny_recipe(tmp_path)))
    assert command(tmp_path / "recipe.toml", tmp_path, "--out", tmp_path / "run") == 2
    assert "is not empty" in capsys.readouterr().err
