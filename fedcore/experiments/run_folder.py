"""The folder a run leaves: what it was, what it measured, and its state after every round."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.data.folders import (
    append_line,
    is_free,
    write_text,
    writing,
)
from fedcore.errors import FedcoreError
from fedcore.federation.record_files import read_record, validated
from fedcore.federation.records import Environment, Record, Round, Summary
from fedcore.federation.state import (
    ServerState,
    latest_state,
    read_about,
    read_state,
    save,
)
from fedcore.recipes import Recipe, load_recipe, to_toml


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
        if not (path / "recipe.toml").is_file():
            raise FedcoreError(f"{path} holds no run: recipe.toml is missing")
        return cls(path)

    @property
    def states(self) -> Path:
        """Where the states after each round are."""
        return self.path / "state"

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        return load_recipe(self.path / "recipe.toml")

    def save(self, state: ServerState) -> None:
        """Write the state of a completed round, then its line of ``metrics.jsonl``."""
        save(state, self.states)
        line = json.dumps(state.record, sort_keys=True, allow_nan=False)
        append_line(line, self.path / "metrics.jsonl")

    def latest(self) -> ServerState | None:
        """The newest complete state, if any."""
        newest = latest_state(self.states)
        return read_state(newest) if newest else None

    def rewind_metrics(self, state: ServerState) -> list[Round]:
        """Make ``metrics.jsonl`` say exactly what the saved states say, and return its records.

        A run can be killed between saving a state and writing its line; the states are the truth.
        """
        folders = [self.states / f"round-{done:04d}" for done in range(state.round + 1)]
        written = [read_about(folder)["record"] for folder in folders]
        lines = [json.dumps(values, sort_keys=True, allow_nan=False) for values in written]
        write_text("".join(line + "\n" for line in lines), self.path / "metrics.jsonl")
        return [
            validated(Round, values, f"the record of {folder}")
            for values, folder in zip(written, folders, strict=True)
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
