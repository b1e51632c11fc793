"""The default engine: every client in this process, one after the other, one model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fedcore.data.base_identity import BaseIdentity, base_differences
from fedcore.errors import FedcoreError
from fedcore.experiments.adapters import generation_sample, write_adapters
from fedcore.experiments.environment import (
    describe_environment,
    git_commit,
    peak_memory_bytes,
    recipe_threads,
)
from fedcore.experiments.observer import Observer
from fedcore.experiments.round import initial_record, run_round
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment, SharedCache, build_experiment
from fedcore.experiments.trials import Trial, check_sources
from fedcore.federation.measures import measure_of
from fedcore.federation.outcome import outcome
from fedcore.federation.records import Round, Summary
from fedcore.federation.state import ServerState
from fedcore.recipes import Recipe, load_recipe

Rounds = Callable[[Experiment, RunFolder, ServerState, Observer], Iterator[ServerState]]
"""What runs the rounds that are left after a state, reports each to the observer, and yields its
state once that is saved in the folder; another engine passes its own."""


def start(
    recipe: Recipe,
    path: Path,
    observer: Observer | None = None,
    cache: SharedCache | None = None,
    rounds: Rounds | None = None,
) -> dict[str, Any]:
    """Run ``recipe`` from the beginning into the empty folder ``path``; returns its summary.

    The state is saved before round 0 and after every round, so a run that is killed at any instant
    continues with :func:`resume`.

    Raises:
        FedcoreError: the folder is not empty, or anything the recipe names does not exist.
    """
    watcher = observer or Observer()
    check_sources(recipe)
    RunFolder.check_free(path)
    with recipe_threads(recipe):
        # Nothing is written before everything the recipe names has been found to fit together.
        experiment = build_experiment(recipe, watcher, cache)
        folder = RunFolder.create(path, recipe)
        folder.write_json("environment.json", describe_environment())
        folder.write_json("partition.json", experiment.counts)
        experiment.base.save(folder.path)
        return _go_on(experiment, folder, None, watcher, rounds or _rounds)


def resume(
    path: Path,
    observer: Observer | None = None,
    cache: SharedCache | None = None,
    rounds: Rounds | None = None,
) -> dict[str, Any]:
    """Continue the run in ``path`` to the bits of a run that was never interrupted.

    The same bits need the same machine, thread count and versions; a difference is reported. A
    finished run is left as it is and its summary returned.

    Raises:
        FedcoreError: ``path`` holds no run, its state is damaged, or the base model here is another
            than the one that the run began with.
    """
    watcher = observer or Observer()
    folder = RunFolder.open(path)
    finished = folder.summary()
    if finished is not None:
        watcher.message(f"{path} is finished already")
        return finished
    recipe = folder.recipe()
    with recipe_threads(recipe):
        environment = describe_environment()
        for name, was, now in folder.changed_environment(environment):
            watcher.message(
                f"{name} was {was} and is {now}: the result may differ in its last bits"
            )
        experiment = build_experiment(recipe, watcher, cache)
        state = folder.latest()
        if state is None:
            folder.write_json("environment.json", environment)
            folder.write_json("partition.json", experiment.counts)
            experiment.base.save(folder.path)
        else:
            experiment = _on_the_same_base(experiment, folder)
            watcher.message(f"resuming: {state.round} of {recipe.rounds} rounds are done")
        return _go_on(experiment, folder, state, watcher, rounds or _rounds)


def _rounds(
    experiment: Experiment, folder: RunFolder, state: ServerState, observer: Observer
) -> Iterator[ServerState]:
    save_seconds = 0.0
    while state.round < experiment.recipe.rounds:
        state = run_round(experiment, state, observer)
        # A state is timed after it is written, so a record carries the save before its own.
        record = Round.model_validate(state.record)
        seconds = {**record.seconds, "save": save_seconds}
        state = _recorded(state, record.model_copy(update={"seconds": seconds}))
        started = perf_counter()
        folder.save(state)
        save_seconds = perf_counter() - started
        observer.round_finished(state.record)
        yield state


def _go_on(
    experiment: Experiment,
    folder: RunFolder,
    state: ServerState | None,
    observer: Observer,
    rounds: Rounds,
) -> dict[str, Any]:
    recipe = experiment.recipe
    # An experiment is built bit for bit the same every time, so a resumed run has its start too.
    start_row = experiment.binding.read()
    if state is None:
        state = ServerState(round=0, layout=experiment.binding.layout, row=start_row)
        state = _recorded(state, initial_record(experiment, state))
        folder.save(state)
    records = folder.rewind_metrics(state)
    observer.run_started(recipe.rounds, state.round)
    for after in rounds(experiment, folder, state, observer):
        state = after
        records.append(Round.model_validate(state.record))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = write_adapters(experiment, state, folder.path)
    adapters = [str(path.relative_to(folder.path)) for path in written]
    summary = summarise(experiment, state, records, adapters)
    if experiment.task.generates:
        folder.write_json("sample.json", generation_sample(experiment, start_row, state))
    folder.write_json("summary.json", summary)
    return summary.plain()


def _on_the_same_base(experiment: Experiment, folder: RunFolder) -> Experiment:
    """``experiment`` with flags that say in what its base differs as it may.

    Raises:
        FedcoreError: it differs otherwise from the one that the run began with.
    """
    before = BaseIdentity.read(folder.path)
    if before is None:  # A run of version 0.1.
        return experiment
    problem, allowed = base_differences(
        experiment.base, before, experiment.recipe.model.allow, "the run's"
    )
    if problem is not None:
        raise FedcoreError(f"{folder.path} cannot be resumed: {problem}")
    return replace(experiment, flags=allowed)


def _recorded(state: ServerState, record: Round) -> ServerState:
    return replace(state, record=record.plain())


def summarise(
    experiment: Experiment, state: ServerState, rounds: Sequence[Round], adapters: Sequence[str]
) -> Summary:
    """The run in one record: quality, traffic, time, memory, versions."""
    recipe = experiment.recipe
    measure = measure_of(recipe.task)
    return Summary(
        recipe=recipe.name,
        method=experiment.method.name,
        seed=recipe.seed,
        rounds=state.round,
        clients=recipe.clients,
        finished=state.round >= recipe.rounds,
        peak_memory_bytes=peak_memory_bytes(),
        git=git_commit(),
        versions=describe_environment().versions,
        adapters=tuple(adapters),
        **outcome(rounds, measure, getattr(recipe.evaluation, f"target_{measure.name}")),
    )


def run_trials(
    trials: Sequence[Trial], out: Path, observer: Observer | None = None
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Run each trial into its own folder below ``out``, yielding its summary.

    Texts and frozen-prefix states are shared between runs. A folder that already holds the same
    recipe is continued, so a comparison that was interrupted resumes where it stopped.
    """
    cache = SharedCache()
    for trial in trials:
        path = out / trial.folder
        if (path / "recipe.toml").is_file():
            existing = load_recipe(path / "recipe.toml")
            if existing != trial.recipe:
                raise FedcoreError(f"{path} holds a run of another recipe; choose another --out")
            yield trial, resume(path, observer, cache)
        else:
            yield trial, start(trial.recipe, path, observer, cache)
