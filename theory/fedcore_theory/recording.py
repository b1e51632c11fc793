"""Records how far every method would have been from the mean of products, along a real run.

One method drives the run; the others are given the same uploads in every round, and what they would
have made of them is measured and thrown away. So all of them are judged on the same data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedcore.data.cohort import Cohort
from fedcore.data.folders import write_text
from fedcore.errors import FedcoreError
from fedcore.experiments.environment import describe_environment, recipe_threads
from fedcore.experiments.observer import Observer
from fedcore.experiments.round import run_round
from fedcore.experiments.setup import build_experiment
from fedcore.federation.diagnostics import diagnose
from fedcore.federation.state import ServerState
from fedcore.methods import Method, create_method
from fedcore.methods.base import Aggregate, Broadcast
from fedcore.recipes import Recipe, load_recipe

FORMAT = 1

PANELS: Mapping[str, tuple[str, ...]] = {
    "fedit": ("fedit", "fedrot", "lora_fair", "flora_na", "product_svd", "fedex"),
    "florg.truncated": ("florg.avg_a", "florg.sketched", "florg.whitened", "florg.truncated"),
}
"""What drives a run, and the methods that are measured on its uploads; one adapter family each."""


@dataclass(frozen=True)
class Divergence:
    """``rho / ||M||`` of every method, layer by layer, along one run.

    Attributes:
        driver: the method whose results the clients continued from.
        modules: L names.
        errors: method to ``rounds`` lists of L numbers, ``||M - result||_F / ||M||_F``.
    """

    driver: str
    modules: tuple[str, ...]
    errors: Mapping[str, tuple[tuple[float, ...], ...]]


def record_divergence(
    recipe: Recipe, methods: Sequence[str], observer: Observer | None = None
) -> Divergence:
    """Run ``recipe`` and measure ``methods`` on its uploads, round by round.

    Methods whose client half ends with a step of its own (FedRot) take it on the raw uploads.

    Raises:
        FedcoreError: as an engine does; or a method of another adapter family than the recipe's.
    """
    with recipe_threads(recipe):
        return _recorded(recipe, methods, observer or Observer())


def _recorded(recipe: Recipe, methods: Sequence[str], watcher: Observer) -> Divergence:
    experiment = build_experiment(recipe, watcher)
    others = [create_method(name) for name in methods]
    for other in others:
        if other.family != experiment.method.family:
            raise FedcoreError(
                f"{other.name} aggregates adapters of family {other.family!r}, the run has "
                f"{experiment.method.family!r}; pass methods of that family"
            )
    errors: dict[str, list[tuple[float, ...]]] = {other.name: [] for other in others}

    def watch(cohort: Cohort, previous: Broadcast) -> None:
        for other in others:
            sent = _as_sent(other, cohort, previous)
            # The mean of products is that of the uploads, whatever a method makes of them.
            diagnostics = diagnose(
                cohort, other.aggregate(sent, previous), previous, other.family, experiment.offset
            )
            errors[other.name].append(tuple(one.aggregation_error for one in diagnostics))

    experiment = replace(experiment, method=_watched(experiment.method, watch))
    state = ServerState(round=0, layout=experiment.binding.layout, row=experiment.binding.read())
    watcher.run_started(recipe.rounds, 0)
    while state.round < recipe.rounds:
        state = run_round(experiment, state, watcher)
        watcher.round_finished(state.record)
    return Divergence(
        driver=experiment.method.name,
        modules=state.layout.modules,
        errors={name: tuple(rounds) for name, rounds in errors.items()},
    )


def _as_sent(method: Method, cohort: Cohort, previous: Broadcast) -> Cohort:
    updates = cohort.updates.clone()
    for row in updates:
        upload = method.prepare_upload(row.clone(), cohort.layout, previous, cohort.round)
        row.copy_(upload.row)
    return replace(cohort, updates=updates)


def _watched(method: Method, watch: Callable[[Cohort, Broadcast], None]) -> Method:
    """``method``, which calls ``watch`` with every cohort before it aggregates it."""
    kind: Any = type(method)

    class Watched(kind):
        def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
            watch(cohort, previous)
            result: Aggregate = super().aggregate(cohort, previous)
            return result

    wrapped: Method = Watched(**{field.name: getattr(method, field.name) for field in fields(kind)})
    return wrapped


def write_record(recipe: str, path: Path, observer: Observer | None = None) -> None:
    """Record every panel on a shipped recipe and write it as JSON."""
    runs = []
    for driver, methods in PANELS.items():
        divergence = record_divergence(
            load_recipe(recipe, {"method.name": driver}), methods, observer
        )
        runs.append({"driver": driver, "modules": divergence.modules, "errors": divergence.errors})
    content = {"format": FORMAT, "recipe": recipe, **describe_environment().plain(), "runs": runs}
    write_text(json.dumps(content, indent=1) + "\n", path)


def read_record(recipe: str) -> tuple[Divergence, ...]:
    """What is recorded of ``recipe`` and comes with the package.

    Raises:
        FedcoreError: nothing is recorded of it.
    """
    place = files("fedcore_theory").joinpath("recorded", f"{recipe}.json")
    if not place.is_file():
        raise FedcoreError(
            f"no run of {recipe!r} is recorded; pass a recorded one, such as bbc-news-fast"
        )
    content = json.loads(place.read_text(encoding="utf-8"))
    return tuple(
        Divergence(
            driver=run["driver"],
            modules=tuple(run["modules"]),
            errors={
                name: tuple(tuple(layers) for layers in rounds)
                for name, rounds in run["errors"].items()
            },
        )
        for run in content["runs"]
    )
