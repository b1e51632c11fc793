"""A run that is resumed continues what it was, or says which of its files is not what it was."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, run_trials, start
from fedcore.experiments.trials import Trial
from fedcore.recipes import load_recipe, to_toml
from tests.experiments.jobs import tiny_recipe
from tests.property.bounds import bounded, size_of

SETTINGS: dict[str, Any] = {
    "method.name": "fedex",  # Its state has a residual, and with kept moments clients' tensors too.
    "optimiser.state": "keep",
    "optimiser.rate": 0.002,
    "rounds": 4,
    "clients": 3,
    "training.steps": 1,
}


class StopAfter(Observer):
    """Ends a run once a round is complete, and remembers what it was told."""

    def __init__(self, rounds: int | None = None) -> None:
        self.rounds, self.messages = rounds, []

    def round_finished(self, record: Any) -> None:
        if self.rounds == record["round"] + 1:
            raise KeyboardInterrupt

    def message(self, text: str) -> None:
        self.messages.append(text)


@dataclass(frozen=True)
class Job:
    """A run of four rounds, whole and stopped after three, with the model and texts it reads."""

    home: Path
    whole: Path
    stopped: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    home = tmp_path_factory.mktemp("job")
    recipe = tiny_recipe(home, **SETTINGS)
    start(recipe, home / "whole")
    with suppress(KeyboardInterrupt):
        start(recipe, home / "stopped", StopAfter(3))
    return Job(home, home / "whole", home / "stopped")


@pytest.fixture
def run(job: Job, tmp_path: Path) -> Path:
    shutil.copytree(job.stopped, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(folder: Path) -> dict[str, Any]:
    """What two runs of the same recipe have alike, to the bit."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    lines = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    adapters = {k: v for k, v in content(folder).items() if k.startswith("adapter")}
    return {"lines": lines, **adapters}


NEWEST = "state/round-0003"
SWAPPED = {"recipe.toml": "other.toml", "texts.csv": "other.csv"}


def flip(file: Path, old: Path) -> None:
    data = bytearray(file.read_bytes())
    # A letter of a word that the model knows, or whatever stands in the middle.
    place = data.find(b"match") if file.suffix == ".csv" else len(data) // 2
    data[place] ^= 1
    file.write_bytes(data)


def edit(file: Path, old: Path) -> None:
    """Something that a hand or a program would change, in a file that still reads."""
    if file.suffix == ".json":
        about = json.loads(file.read_text())
        about["record"]["loss"] = 0.0
        file.write_text(json.dumps(about))
    elif file.suffix == ".toml":
        file.write_text(file.read_text().replace("rate = 0.002", "rate = 0.5"))
    elif file.suffix == ".csv":
        file.write_text(file.read_text().replace(",film", ",money", 3))
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        name = sorted(name for name in tensors if "classifier" not in name)[0]
        tensors[name] = tensors[name] + 1
        save_file(tensors, file, metadata={"format": "pt"})


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "flipped": flip,
    "truncated": lambda file, old: file.write_bytes(file.read_bytes()[: -len(file.name) - 20]),
    "edited": edit,
    "exchanged": lambda file, old: shutil.copy(old, file),
    "deleted": lambda file, old: file.unlink(),
}

NAMES = {
    f"{NEWEST}/server.safetensors": "server.safetensors",
    f"{NEWEST}/residual.safetensors": "residual.safetensors",
    f"{NEWEST}/clients.safetensors": "clients.safetensors",
    f"{NEWEST}/state.json": "state.json",
    "state/round-0001/state.json": r"state/round-0001",
    "recipe.toml": "recipe.toml",
}


@pytest.mark.parametrize("name", list(NAMES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_damaged_file_is_refused_by_name_and_nothing_is_changed(
    kind: str, name: str, job: Job, run: Path
) -> None:
    old = run / name.replace("round-0003", "round-0002").replace("round-0001", "round-0000")
    if name == "recipe.toml":
        old = run.parent / "other.toml"
        old.write_text(to_toml(tiny_recipe(job.home, **{**SETTINGS, "training.steps": 2})))
    KINDS[kind](run / name, old)
    before = content(run)
    with pytest.raises(FedcoreError, match=NAMES[name]) as caught:
        resume(run)
    assert content(run) == before
    assert "\n" not in str(caught.value)
    if name == "recipe.toml":
        return
    good = 2 if NEWEST in name else 0
    offer = f"the newest good state is that of round {good}: continue from it with fedcore run"
    assert f"{offer} --resume {run} --from-round {good}" in str(caught.value)
    # What it offers works, and ends with the bits of a run that nothing happened to.
    if good and kind == "flipped":
        resume(run, from_round=good)
        assert results(run) == results(job.whole)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("flipped", "edited") else pytest.param(kind, marks=pytest.mark.exhaustive)
        for kind in KINDS
    ],
)
@pytest.mark.parametrize("what", ["texts.csv", "model/model.safetensors"])
def test_other_data_or_another_model_are_refused_by_name(
    kind: str, what: str, job: Job, run: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    recipe = tiny_recipe(home, **SETTINGS)
    shutil.rmtree(run)
    with suppress(KeyboardInterrupt):
        start(recipe, run, StopAfter(1))
    other = tiny_recipe(tmp_path / "other", seed=1)
    old = tmp_path / "other" / what
    if what.endswith(".csv"):
        old.write_text(old.read_text().replace("bank", "fund"))
    else:
        edit(old, old)
    assert other.rounds
    KINDS[kind](home / what, old)
    before = content(run)
    place = str(home / what)
    with pytest.raises(FedcoreError) as caught:
        resume(run)
    said = str(caught.value)
    if what.endswith(".csv"):
        assert f"data.source = {place!r}" in said or place in said
    else:
        assert "its base differs from" in said or str(home / "model") in said
    assert content(run) == before


def test_a_state_that_was_deleted_is_missed(run: Path, job: Job) -> None:
    shutil.rmtree(run / NEWEST)
    with pytest.raises(FedcoreError, match=r"lost the state of round 3, .* --from-round 2"):
        resume(run)
    resume(run, from_round=2)
    assert results(run) == results(job.whole)


def test_without_any_state_a_run_does_not_start_over_in_silence(run: Path) -> None:
    shutil.rmtree(run / "state")
    with pytest.raises(FedcoreError, match="has lost the state of round 3"):
        resume(run)


def test_later_states_are_discarded_for_good(run: Path, job: Job) -> None:
    with suppress(KeyboardInterrupt):
        resume(run, StopAfter(3), from_round=2)
    rounds = sorted(path.name for path in (run / "state").iterdir())
    assert rounds == [f"round-000{n}" for n in range(4)]
    resume(run)
    assert results(run) == results(job.whole)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (9, "has no state of round 9; it has those of rounds 0 to 3"),
        (1, r"only the newest 2 states keep; the newest good state is that of round 3"),
    ],
)
def test_a_round_that_cannot_be_continued_from_is_refused(
    wanted: int, message: str, run: Path
) -> None:
    before = content(run)
    with pytest.raises(FedcoreError, match=message):
        resume(run, from_round=wanted)
    assert content(run) == before


def test_the_start_can_always_be_continued_from(run: Path, job: Job) -> None:
    resume(run, from_round=0)
    assert results(run) == results(job.whole)


def test_a_finished_run_has_no_round_to_continue_from(job: Job) -> None:
    with pytest.raises(FedcoreError, match="is finished"):
        resume(job.whole, from_round=2)


def test_what_can_be_rebuilt_is(run: Path, job: Job) -> None:
    (run / "partition.json").write_text("{")
    (run / "environment.json").unlink()
    (run / "metrics.jsonl").write_text("[[[")
    resume(run)
    for name in ("partition.json", "environment.json"):
        assert (run / name).read_bytes() == (job.whole / name).read_bytes()
    assert results(run) == results(job.whole)


def unsealed(run: Path) -> None:
    """As version 0.1 wrote it."""
    for file in (run / "state").glob("*/state.json"):
        about = json.loads(file.read_text())
        kept = {k: v for k, v in about.items() if k not in ("files", "origin", "seal")}
        file.write_text(json.dumps(kept))


def test_a_run_of_the_first_version_is_resumed_and_said_to_be_unverified(
    run: Path, job: Job
) -> None:
    unsealed(run)
    observer = StopAfter()
    resume(run, observer)
    assert any("cannot be verified" in text for text in observer.messages)
    assert results(run) == results(job.whole)
    about = json.loads((run / "state/round-0004/state.json").read_text())
    assert {"files", "origin", "seal"} < about.keys()
    assert sorted(about["origin"]) == ["data", "model", "recipe"]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace("rate = 0.002", "rate = 2e-3"),
        lambda text: "# a note\n" + text.replace(" = ", "   =   "),
        lambda text: text.replace("alpha = 16.0", "alpha = 16"),
    ],
)
def test_a_recipe_may_be_written_otherwise(
    rewrite: Callable[[str], str], run: Path, job: Job
) -> None:
    file = run / "recipe.toml"
    text = rewrite(file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    resume(run)
    assert results(run) == results(job.whole)


def test_a_comparison_knows_its_runs_by_what_their_recipes_say(tmp_path: Path) -> None:
    settings = {"rounds": 1, "clients": 2, "training.steps": 1}
    layers = {"adapter.layers": [1, 2], "adapter.alpha": 16}
    recipe = tiny_recipe(tmp_path, **settings, **layers)
    trial = Trial(recipe, "florg", 0, {}, "one")
    list(run_trials([trial], tmp_path / "out"))
    file = tmp_path / "out" / "one" / "recipe.toml"
    file.write_text(file.read_text().replace("alpha = 16.0", "alpha = 16"))
    assert load_recipe(file) == recipe
    again = list(run_trials([trial], tmp_path / "out"))
    assert [summary["finished"] for _, summary in again] == [True]
    other = Trial(tiny_recipe(tmp_path, **settings), "florg", 0, {}, "one")
    with pytest.raises(FedcoreError, match="holds a run of another recipe"):
        list(run_trials([other], tmp_path / "out"))
    long = Trial(recipe, "florg", 0, {}, "n" * 300)
    with pytest.raises(FedcoreError, match="pass a shorter name"):
        list(run_trials([long], tmp_path / "out"))


def test_two_processes_cannot_continue_one_run(run: Path) -> None:
    class Second(StopAfter):
        def round_finished(self, record: Any) -> None:
            with pytest.raises(FedcoreError, match="is in use by process"):
                resume(run)
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        resume(run, Second())
    assert not (run / ".lock").exists()


def damage(rng: random.Random, run: Path) -> None:
    """Change one file of ``run``, in a place that ``rng`` draws."""
    files = [file for file in sorted(run.rglob("*")) if file.is_file()]
    file = rng.choice([file for file in files if file.name != "log.txt"])
    data = bytearray(file.read_bytes())
    what = rng.choice(["bytes", "bytes", "bit", "cut", "grow", "empty", "gone", "folder", "link"])
    if not data or what in ("gone", "folder", "link"):
        file.unlink()
        if what == "folder":
            file.mkdir()
        elif what == "link":
            file.symlink_to(rng.choice(["/dev/zero", str(file), str(run / "elsewhere")]))
    elif what == "bytes":
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
    elif what == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif what == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif what == "grow":
        file.write_bytes(data + rng.randbytes(rng.randrange(1, 40)))
    else:
        file.write_bytes(b"")


@pytest.mark.parametrize(
    "seeds",
    [range(30), pytest.param(range(30, 300), marks=pytest.mark.exhaustive)],
    ids=["few", "rest"],
)
def test_a_run_with_a_damaged_file_is_refused_or_ends_with_the_same_bits(
    seeds: range, job: Job, tmp_path: Path
) -> None:
    expected, seen = results(job.whole), Counter[bool]()
    for seed in seeds:
        run = tmp_path / f"{seed}"
        shutil.copytree(job.stopped, run)
        damage(random.Random(seed), run)
        before = tree(run)
        refused = None
        try:
            with bounded(size_of(run)):
                resume(run)
        except FedcoreError as error:
            refused = str(error)
        if refused is None:
            assert results(run) == expected, seed
        else:
            assert "\n" not in refused, seed
            assert len(refused) < 2000, seed
            assert tree(run) == before, seed
        seen[refused is None] += 1
        shutil.rmtree(run)
    assert seen[False] > len(seeds) / 4
    assert seen[True] > 0


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file by its bytes and every link by where it leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }
