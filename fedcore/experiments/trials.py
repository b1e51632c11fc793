"""Which runs a comparison is made of: methods x seeds x any keys of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedcore.errors import FedcoreError
from fedcore.experiments.site_data import site_files
from fedcore.methods.registry import find_method, method_classes
from fedcore.recipes import SITES, Recipe, load_recipe
from fedcore.training.datasets import check_data_source
from fedcore.training.hub_access import check_obtainable
from fedcore.training.models import check_model_source


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
    names = [m.name for m in method_classes()] if list(methods) == ["all"] else list(methods)
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
    for trial in trials:
        check_sources(trial.recipe)
    return trials


def check_sources(recipe: Recipe) -> None:
    """Refuse a model or data set that cannot exist or be had, before anything is loaded.

    Raises:
        FedcoreError: one line with the nearest valid names, or with what to pass instead of a hub
            id that is out of reach.
    """
    recipe.model.weights.check()
    model = check_model_source(recipe.model.source)
    check_obtainable("model", model)
    if recipe.data.sites is not None:
        site_files(recipe.data.sites)
    elif recipe.data.source != SITES:
        check_obtainable("dataset", check_data_source(recipe.data.source))
