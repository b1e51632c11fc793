"""How many threads a run computes on, and what of its result depends on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

from fedcore.errors import FedcoreError
from fedcore.experiments.environment import recipe_threads
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.federation.state import latest_state, read_state
from fedcore.recipes import to_toml
from tests.experiments.jobs import tiny_recipe
from tests.experiments.messages import Messages
from tests.processes import thread_limits

ROOT = Path(__file__).resolve().parents[2]

SMALL = {"clients": 2, "training.steps": 1, "evaluation.every": 2}

RUN_ALL = """
import sys
from pathlib import Path
import torch
from fedcore.experiments.run import start
from fedcore.recipes import load_recipe

before = torch.get_num_threads()
for recipe in sorted(Path(sys.argv[1]).glob("*.toml")):
    start(load_recipe(recipe), Path(sys.argv[2]) / recipe.stem)
    assert torch.get_num_threads() == before
"""


def environment(threads):
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "theory"))
    return {**os.environ, **thread_limits(threads), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_every_process_that_a_test_starts_computes_on_one_thread():
    assert torch.get_num_threads() == 1
    assert blas_threads() == {1}
    child = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout == "1\n"


@pytest.mark.slow
def test_threads_move_the_last_bits_and_a_recipe_that_sets_them_none(home, tmp_path):
    """A process on one thread and one on two run recipes that leave threads unset or swap them."""
    methods, running = ("florg", "ce_lora"), {}
    for threads, other in ((1, 2), (2, 1)):
        recipes = tmp_path / f"recipes-{threads}"
        recipes.mkdir()
        for method in methods:
            for name, own in (("unset", {}), ("set", {"training.threads": other})):
                recipe = tiny_recipe(home, **{"method.name": method, "adapter.rank": 8, **own})
                (recipes / f"{method}-{name}.toml").write_text(to_toml(recipe))
        running[threads] = subprocess.Popen(
            [sys.executable, "-c", RUN_ALL, str(recipes), str(tmp_path / f"on-{threads}")],
            env=environment(threads),
            stderr=subprocess.PIPE,
            text=True,
        )
    for process in running.values():
        _, error = process.communicate(timeout=500)
        assert process.returncode == 0, error
    rows, recorded = {}, {}
    for threads in (1, 2):
        for folder in (tmp_path / f"on-{threads}").iterdir():
            rows[threads, folder.name] = read_state(latest_state(folder / "state")).row
            environment_file = json.loads((folder / "environment.json").read_text())
            recorded[threads, folder.name] = environment_file["threads"]
    for method in methods:
        unset = [rows[threads, f"{method}-unset"] for threads in (1, 2)]
        torch.testing.assert_close(*unset, rtol=0, atol=1e-5)
        assert torch.equal(rows[2, f"{method}-set"], unset[0])
        assert torch.equal(rows[1, f"{method}-set"], unset[1])
        for threads, other in ((1, 2), (2, 1)):
            assert recorded[threads, f"{method}-unset"] == threads
            assert recorded[threads, f"{method}-set"] == other


def test_a_process_gets_its_own_threads_back(home):
    def fail(recipe):
        with recipe_threads(recipe):
            assert torch.get_num_threads() == 3
            assert blas_threads() == {3}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(tiny_recipe(home, **{"training.threads": 3}))
    assert torch.get_num_threads() == 1
    assert blas_threads() == {1}
    with recipe_threads(tiny_recipe(home)):
        assert torch.get_num_threads() == 1


def test_a_run_that_is_resumed_on_other_threads_says_so(home, tmp_path):
    recipe, messages = tiny_recipe(home, **SMALL), Messages()
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "run", Interrupted())
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["threads"] == 1
    torch.set_num_threads(2)
    try:
        resume(tmp_path / "run", messages)
    finally:
        torch.set_num_threads(1)
    assert "threads was 1 and is 2: the result may differ in its last bits" in messages.texts


def test_a_run_that_sets_its_threads_is_resumed_on_them(home, tmp_path):
    recipe, messages = tiny_recipe(home, **SMALL, **{"training.threads": 2}), Messages()
    with pytest.raises(KeyboardInterrupt):
        start(recipe, tmp_path / "run", Interrupted())
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["threads"] == 2
    assert torch.get_num_threads() == 1
    resume(tmp_path / "run", messages)
    assert messages.texts == ["resuming: 1 of 2 rounds are done"]


@pytest.mark.parametrize("threads", [0, -1, 1.5, "many"])
def test_a_number_of_threads_is_a_whole_number(threads, home):
    with pytest.raises(FedcoreError, match=r"recipe key training\.threads"):
        tiny_recipe(home, **{"training.threads": threads})


class Interrupted(Observer):
    def round_finished(self, record):
        raise KeyboardInterrupt
