"""A run survives what happens to its process and its disk, to the bit."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedcore.data.folders import sweep
from fedcore.errors import FedcoreError
from fedcore.experiments.run import resume, start
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import SharedCache
from fedcore.federation.checkpoints import read_newest
from fedcore.recipes import Recipe
from tests.data.test_folders import CALLS, failing
from tests.data.test_folders import content as visible
from tests.experiments.jobs import tiny_recipe
from tests.experiments.test_damaged_runs import content, results

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EVENTS = frozenset(
    {
        *("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"),
        *("os.scandir", "shutil.rmtree"),
    }
)
"""What Python does to files, as its audit hooks are told before it is done."""

CACHE = SharedCache()


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    settings = {"method.name": "product_svd", "optimiser.state": "keep", "training.steps": 1}
    return tiny_recipe(home, clients=2, rounds=2, **settings)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(recipe, folder, cache=CACHE)
    return folder


def in_a_child(act: Callable[[], Any], folder: Path, die_at: int | None = None) -> int:
    """The status of a process that acts, and is killed before that file event in ``folder``.

    Without ``die_at`` the status says nothing: the number of events is in ``folder.events``.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and any(
            isinstance(argument, str | os.PathLike) and str(argument).startswith(str(folder))
            for argument in arguments
        ):
            if seen == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    try:
        sys.addaudithook(hook)
        act()
        Path(f"{folder}.events").write_text(str(seen))
    finally:
        os._exit(0)


def events_of(recipe: Recipe, folder: Path) -> int:
    in_a_child(lambda: start(recipe, folder, cache=CACHE), folder)
    return int(Path(f"{folder}.events").read_text())


FEW, MANY = 9, 60


@pytest.mark.parametrize(
    "fraction",
    [
        *(pytest.param(n / (FEW - 1), id=f"{n}-of-{FEW}") for n in range(FEW)),
        *(
            pytest.param(n / (MANY - 1), id=f"{n}-of-{MANY}", marks=pytest.mark.exhaustive)
            for n in range(MANY)
        ),
    ],
)
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(
    fraction: float, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    total = events_of(recipe, tmp_path / "counted")
    assert total > 50
    run = tmp_path / "run"
    at = round(fraction * (total - 1))
    finished = False
    killed = in_a_child(lambda: start(recipe, run, cache=CACHE), run, at)
    assert killed == -signal.SIGKILL
    if not (run / "recipe.toml").is_file():
        # Nothing has begun: what was left is in nobody's way.
        start(recipe, run, cache=CACHE)
    else:
        # Killed in the middle of what is left, where that is long enough.
        in_a_child(lambda: resume(run, cache=CACHE), run, max(3, (total - at) // 2))
        finished = (run / "summary.json").is_file()
        resume(run, cache=CACHE)
    assert results(run) == results(whole)
    # A finished run is left as it is: with the lock and the leftover of who died at its end.
    assert finished or not list(run.rglob(".*"))
    assert read_newest(run / "state").round == 2


def test_a_live_process_keeps_others_out_and_a_killed_one_does_not(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:

        class Waiting:
            def __getattr__(self, name: str) -> Callable[..., None]:
                def called(*arguments: Any) -> None:
                    if name == "round_finished":
                        os.write(told, b"x")
                        signal.pause()

                return called

        start(recipe, run, Waiting(), CACHE)  # type: ignore[arg-type]
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    for act in (lambda: resume(run, cache=CACHE), lambda: resume(run, from_round=0)):
        with pytest.raises(FedcoreError, match=rf"run is in use by process {child} on .*: wait"):
            act()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    resume(run, cache=CACHE)
    assert results(run) == results(whole)


FAILURES = (errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EIO)


@pytest.mark.parametrize(
    "step",
    [
        *range(0, 100, 17),
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(100) if n % 17),
    ],
)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
def test_a_write_that_fails_is_one_line_and_the_run_can_be_resumed(
    step: int, lasting: bool, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    run, number = tmp_path / "run", FAILURES[step % len(FAILURES)]

    def failure() -> OSError:
        return OSError(number, os.strerror(number))

    with failing(step, failure, lasting=lasting) as calls:
        try:
            start(recipe, run, cache=CACHE)
            # A disk need not have hard links, and the end may come before the failure.
            assert len(calls) <= step or calls[step] == "link"
        except FedcoreError as error:
            said = str(error)
            assert said.startswith(f"cannot write {run}")
            assert os.strerror(number) in said
            assert "\n" not in said
    if (run / "recipe.toml").is_file():
        resume(run, cache=CACHE)
    else:
        start(recipe, run, cache=CACHE)
    assert results(run) == results(whole)


def test_writes_of_a_run_are_as_many_as_are_tried(recipe: Recipe, tmp_path: Path) -> None:
    with failing(None, OSError) as calls:
        start(recipe, tmp_path / "run", cache=CACHE)
    assert 40 <= len(calls) <= 110
    assert set(calls) == set(CALLS)


def limited(act: Callable[[], Any], what: int, limit: int) -> str:
    """What a process with a limit of the operating system says: an error's text, or nothing."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"died"
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))
            act()
            said = b""
        except FedcoreError as error:
            said = str(error).encode()
        except BaseException as error:
            said = repr(error).encode()
        finally:
            os.write(told, said[:4000])
            os._exit(0)
    os.close(told)
    os.waitpid(child, 0)
    with os.fdopen(ready, "rb") as pipe:
        return pipe.read().decode()


@pytest.mark.parametrize("spare", range(6))
def test_too_few_open_files_are_one_clear_line(
    spare: int, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    """The limit itself, not a stand-in: a state is saved with few descriptors left."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    state = read_newest(run / "state")
    assert state is not None
    shutil.rmtree(run / "state" / "round-0002")
    before = visible(run / "state")
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 3
    said = limited(lambda: RunFolder(run).save(state), resource.RLIMIT_NOFILE, used + spare)
    if said:
        assert said.startswith(f"cannot write {run}")
        assert said.endswith("close files, or raise the limit of open ones (ulimit -n)")
        assert visible(run / "state") in (before, visible(whole / "state"))
        # Deleting a folder needs a descriptor, too.
        sweep(run / "state")
        assert content(run / "state") == visible(run / "state")
    else:
        assert content(run / "state") == content(whole / "state")


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_limit_of_file_sizes_is_one_clear_line(
    size: int, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = limited(lambda: start(recipe, run, cache=CACHE), resource.RLIMIT_FSIZE, size)
    assert said.startswith(f"cannot write {run}")
    assert "File too large; raise the limit of file sizes (ulimit -f)" in said
    act = resume if (run / "recipe.toml").is_file() else start
    act(*([run] if act is resume else [recipe, run]), cache=CACHE)
    assert results(run) == results(whole)


def test_a_line_of_metrics_that_was_cut_off_is_written_again(
    recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with suppress(FedcoreError), failing(30, lambda: OSError(errno.ENOSPC, "full"), lasting=True):
        start(recipe, run, cache=CACHE)
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        metrics.write_bytes(metrics.read_bytes()[:-7])
    resume(run, cache=CACHE)
    assert [json.loads(line)["round"] for line in metrics.open()] == [-1, 0, 1]
    assert results(run) == results(whole)
