"""Many runs of one recipe: methods x seeds x any keys of the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedcore.engines.local import resume, start
from fedcore.engines.observer import Observer
from fedcore.engines.workbench import Shelf, check_sources
from fedcore.errors import FedcoreError
from fedcore.methods import METHODS, find_method
from fedcore.recipes import Recipe, load_recipe


@dataclass(frozen=True)
class Trial:
    """One run of a comparison: its recipe, what was varied, and its folder's name."""

    recipe: Recipe
    method: str
    seed: int
    varied: Mapping[str, Any]
    folder: str


def plan_trials(
    recipe_name: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    vary: Mapping[str, Sequence[Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Trial]:
    """Every combination, each validated before the first one trains.

    ``methods = ["all"]`` takes every method there is.

    Raises:
        FedcoreError: an unknown recipe, method or key, or nothing to compare.
    """
    names = [m.name for m in METHODS] if list(methods) == ["all"] else list(methods)
    resolved = list(dict.fromkeys(find_method(name).name for name in names))
    if not resolved or not seeds:
        raise FedcoreError("a comparison needs at least one method and one seed")
    varied = dict(vary or {})
    trials = []
    for values in product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        for method, seed in product(resolved, seeds):
            overrides = {**(settings or {}), **chosen, "method.name": method, "seed": seed}
            recipe = load_recipe(recipe_name, overrides)
            tags = [f"{key}={value}" for key, value in chosen.items()]
            name = "_".join([*tags, method, f"seed{seed}"]).replace("/", "-")
            trials.append(Trial(recipe, method, seed, chosen, name))
    check_sources(trials[0].recipe)
    return trials


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
