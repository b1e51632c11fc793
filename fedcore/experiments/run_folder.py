"""The folder a run leaves: what it was, what it measured, and its state after every round."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.checks import is_integer
from fedcore.data.folders import (
    OWN_LIMIT,
    append_line,
    delete_folder,
    is_free,
    read_regular,
    sweep,
    write_text,
    writing,
)
from fedcore.errors import FedcoreError
from fedcore.federation.checkpoints import offering_newest_good, read_newest, save
from fedcore.federation.record_fields import Record
from fedcore.federation.record_files import read_record, validated
from fedcore.federation.records import Environment, Round, Summary
from fedcore.federation.seals import SEAL
from fedcore.federation.state import (
    ServerState,
    read_about,
    read_state,
    round_of,
    state_folders,
)
from fedcore.recipes import Recipe, load_recipe, recipe_digest, to_toml


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; every one is written whole or not at all."""

    path: Path

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a folder that already holds something.

        Raises:
            FedcoreError: naming the folder and what to pass.
        """
        with writing(path):
            free = is_free(path)
        if not free:
            raise FedcoreError(
                f"{path} is not empty; resume it with --resume or choose another --out"
            )

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunFolder:
        """An empty run folder with the resolved recipe.

        Raises:
            FedcoreError: the folder already holds something.
        """
        cls.check_free(path)
        write_text(to_toml(recipe), path / "recipe.toml")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            FedcoreError: there is none.
        """
        if not cls.is_there(path):
            raise FedcoreError(f"{path} holds no run: recipe.toml is missing")
        return cls(path)

    @staticmethod
    def is_there(path: Path) -> bool:
        """Whether ``path`` holds a run, begun or finished.

        Raises:
            FedcoreError: no folder can have that name.
        """
        with writing(path):
            return (path / "recipe.toml").is_file()

    def sweep(self) -> None:
        """Delete what killed processes left; only one that has claimed the folder may."""
        sweep(self.path)
        sweep(self.states)

    @property
    def states(self) -> Path:
        """Where the states after each round are."""
        return self.path / "state"

    def recipe(self) -> Recipe:
        """The resolved recipe of the run.

        Raises:
            FedcoreError: the file cannot be read, or does not hold one.
        """
        file = self.path / "recipe.toml"
        try:
            return load_recipe(file)
        except FedcoreError as error:
            raise FedcoreError(
                str(error) if str(file) in str(error) else f"{file}: {error}"
            ) from error

    def recipe_digest(self) -> str:
        """The hash of what ``recipe.toml`` says."""
        return recipe_digest(self.path / "recipe.toml")

    def save(self, state: ServerState) -> None:
        """Write the state of a completed round, then its line of ``metrics.jsonl``."""
        save(state, self.states)
        line = json.dumps(state.record, sort_keys=True, allow_nan=False)
        append_line(line, self.path / "metrics.jsonl")

    def state(self, from_round: int | None = None) -> ServerState | None:
        """The state to continue from, verified with the records of all rounds before it.

        Args:
            from_round: of which round; the newest one by default.

        Returns:
            None of a run that was stopped before its first state.

        Raises:
            FedcoreError: the folder has no such state; the state or an earlier record is missing,
                damaged, edited or exchanged. The message says from which round one can continue.
        """
        states = state_folders(self.states)
        if from_round is not None and from_round not in states:
            rounds = f"those of rounds {min(states)} to {max(states)}" if states else "none"
            raise FedcoreError(f"{self.path} has no state of round {from_round}; it has {rounds}")
        with offering_newest_good(self.states, self._offer):
            if from_round is not None:
                state = read_state(states[from_round])
                self._records(from_round)
                return state
            newest = read_newest(self.states)
            recorded = self._recorded()
            if recorded > (-1 if newest is None else newest.round):
                raise FedcoreError(
                    f"{self.states} has lost the state of round {recorded}, whose record is in "
                    "metrics.jsonl"
                )
            if newest is not None:
                self._records(newest.round)
            return newest

    def _offer(self, round: int) -> str:
        return f"continue from it with fedcore run --resume {self.path} --from-round {round}"

    def _recorded(self) -> int:
        """The latest round done that ``metrics.jsonl`` has a whole line of; -1 of none."""
        file = self.path / "metrics.jsonl"
        try:
            lines = read_regular(file, limit=OWN_LIMIT).split(b"\n")
        except FileNotFoundError:
            return -1
        except OSError as error:
            raise FedcoreError(f"cannot read {file}: {error.strerror}") from error
        latest = -1
        for line in lines:
            try:
                index = json.loads(line)["round"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if is_integer(index):
                latest = max(latest, index + 1)
        return latest

    def _records(self, done: int) -> list[dict[str, Any]]:
        """What the states of the rounds up to ``done`` have recorded."""
        abouts = [read_about(self.states / f"round-{round:04d}") for round in range(done + 1)]
        hashed = [SEAL in about for about in abouts]
        if hashed != sorted(hashed):
            round = hashed.index(False, hashed.index(True))
            raise FedcoreError(f"the state.json of round {round} has lost its hashes")
        return [about["record"] for about in abouts]

    def discard_after(self, round: int) -> None:
        """Delete the states of later rounds, the latest first.

        Raises:
            FedcoreError: one cannot be deleted.
        """
        numbered = ((round_of(path) or 0, path) for path in self.states.glob("round-*"))
        later = {number: path for number, path in numbered if number > round}
        for path in dict(sorted(later.items(), reverse=True)).values():
            delete_folder(path)

    def rewind_metrics(self, state: ServerState) -> list[Round]:
        """Make ``metrics.jsonl`` say exactly what the saved states say, and return its records.

        A run can be killed between saving a state and writing its line; the states are the truth.
        """
        written = self._records(state.round)
        lines = [json.dumps(values, sort_keys=True, allow_nan=False) for values in written]
        write_text("".join(line + "\n" for line in lines), self.path / "metrics.jsonl")
        return [
            validated(Round, values, f"the record of {self.states / f'round-{done:04d}'}")
            for done, values in enumerate(written)
        ]

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None while it is not."""
        file = self.path / "summary.json"
        if not file.is_file():
            return None
        summary = read_record(Summary, file)
        return summary.plain() if summary.finished else None

    def changed_environment(self, now: Environment) -> list[tuple[str, Any, Any]]:
        """What differs between the machine that began the run and this one: name, then, now."""
        file = self.path / "environment.json"
        if not file.is_file():
            return []
        before = read_record(Environment, file)
        names = ("python", "platform", "threads", "gpu")
        both = [(name, getattr(before, name), getattr(now, name)) for name in names]
        changes = [(name, was, value) for name, was, value in both if was != value]
        for package, version in now.versions.items():
            was = before.versions.get(package)
            if was != version:
                changes.append((package, was, version))
        return changes

    def write_json(self, name: str, record: Record) -> None:
        """Write one JSON file of the folder."""
        text = json.dumps(record.plain(), indent=2, sort_keys=True, allow_nan=False)
        write_text(text + "\n", self.path / name)
