"""Many runs of one recipe, sharing what they can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedcore.engines.local import resume, start
from fedcore.engines.observer import Observer
from fedcore.engines.trials import Trial
from fedcore.engines.workbench import Shelf
from fedcore.errors import FedcoreError
from fedcore.recipes import load_recipe


def run_trials(
    trials: Sequence[Trial], out: Path, observer: Observer | None = None
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Run each trial into its own folder below ``out``, yielding its summary.

    Texts and frozen-prefix states are shared between runs. A folder that already holds the same
    recipe is continued, so a comparison that was interrupted goes on where it stopped.
    """
    shelf = Shelf()
    for trial in trials:
        path = out / trial.folder
        if (path / "recipe.toml").is_file():
            held = load_recipe(path / "recipe.toml")
            if held != trial.recipe:
                raise FedcoreError(f"{path} holds a run of another recipe; choose another --out")
            yield trial, resume(path, observer, shelf)
        else:
            yield trial, start(trial.recipe, path, observer, shelf)
