"""The engine of a recipe, by name; an engine's libraries are imported when it is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fedcore.errors import unknown_name
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import SharedCache
from fedcore.recipes import Recipe


class Engine(Protocol):
    """What every engine's module offers."""

    def start(
        self,
        recipe: Recipe,
        path: Path,
        observer: Observer | None = None,
        cache: SharedCache | None = None,
    ) -> dict[str, Any]:
        """Run ``recipe`` into the empty folder ``path``; returns its summary."""

    def resume(
        self,
        path: Path,
        observer: Observer | None = None,
        cache: SharedCache | None = None,
        *,
        from_round: int | None = None,
    ) -> dict[str, Any]:
        """Continue the run in ``path`` after its newest state, or that of ``from_round``."""


def find_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        FedcoreError: there is none.
        MissingExtraError: its libraries are not installed.
    """
    if name == "local":
        from fedcore.experiments import run as local

        return local
    if name == "flower":
        from fedcore.transports.flower import simulation

        return simulation
    raise unknown_name("engine", name, ["local", "flower"])
