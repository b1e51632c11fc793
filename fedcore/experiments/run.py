"""The default engine: every client in this process, one after the other, one model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fedcore.data.claims import claimed
from fedcore.errors import FedcoreError
from fedcore.experiments.adapters import generation_sample, write_adapters
from fedcore.experiments.answers import check_answers, run_answers
from fedcore.experiments.environment import (
    describe_environment,
    git_commit,
    peak_memory_bytes,
    recipe_threads,
)
from fedcore.experiments.observer import Observer
from fedcore.experiments.origin import (
    check_origin,
    check_recipe_kept,
    differences_of_base,
    run_origin,
)
from fedcore.experiments.privacy import check_continued
from fedcore.experiments.round import initial_record, run_round
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment, SharedCache, build_experiment
from fedcore.experiments.trials import Trial, check_sources
from fedcore.federation.measures import measure_of
from fedcore.federation.outcome import outcome
from fedcore.federation.record_files import validated
from fedcore.federation.records import Round, Summary
from fedcore.federation.state import ServerState
from fedcore.recipes import SITES, Recipe, recipe_digest

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
        FedcoreError: the folder is not empty or in use, or anything the recipe names does not
            exist.
    """
    watcher = observer or Observer()
    if rounds is None:
        check_simulated(recipe)
    check_sources(recipe)
    check_answers(recipe)
    RunFolder.check_free(path)
    with recipe_threads(recipe):
        # Nothing is written before everything the recipe names has been found to fit together.
        experiment = build_experiment(recipe, watcher, cache)
        with claimed(path):
            folder = RunFolder.create(path, recipe)
            folder.write_json("environment.json", describe_environment())
            folder.write_json("partition.json", experiment.counts)
            experiment.base.save(folder.path)
            origin = run_origin(experiment, folder)
            return _go_on(experiment, folder, None, origin, watcher, rounds or _rounds)


def check_simulated(recipe: Recipe) -> None:
    """Refuse to simulate sites whose files are on other machines.

    Raises:
        FedcoreError: with what to do instead.
    """
    if recipe.data.source == SITES:
        raise FedcoreError(
            "data.source = 'sites' is a deployment, whose nodes have the data: write its app with "
            "fedcore flower-app, or set data.sites to a folder with one file per site instead"
        )


def resume(
    path: Path,
    observer: Observer | None = None,
    cache: SharedCache | None = None,
    rounds: Rounds | None = None,
    *,
    from_round: int | None = None,
) -> dict[str, Any]:
    """Continue the run in ``path`` to the bits of a run that was never interrupted.

    The same bits need the same machine, thread count and versions; a difference is reported. A
    finished run is left as it is and its summary returned.

    Args:
        from_round: continue from the state after so many rounds, and discard those after it; from
            the newest one by default.

    Raises:
        FedcoreError: ``path`` holds no run, or is in use; a file of its state, its recipe, its data
            or its model is not what it was, naming it; privacy would be counted wrongly.
    """
    watcher = observer or Observer()
    folder = RunFolder.open(path)
    finished = folder.summary()
    if finished is not None:
        if from_round is not None:
            raise FedcoreError(f"{path} is finished; only a run that is not has rounds left")
        watcher.message(f"{path} is finished already")
        return finished
    with claimed(path):
        folder.sweep()
        state = folder.state(from_round)
        if state is not None:
            check_recipe_kept(state.origin, folder)
        recipe = folder.recipe()
        if rounds is None:
            check_simulated(recipe)
        if state is not None:
            check_continued(recipe, validated(Round, state.record, f"the newest record of {path}"))
        with recipe_threads(recipe):
            _say_what_changed(folder, watcher, begun=state is not None)
            experiment = build_experiment(recipe, watcher, cache)
            if state is None:
                experiment.base.save(folder.path)
            else:
                allowed = differences_of_base(experiment, folder, "resumed")
                experiment = replace(experiment, flags=(*experiment.flags, *allowed))
            origin = run_origin(experiment, folder)
            if state is not None:
                if not state.origin:
                    watcher.message(
                        f"{path} was written by a version that kept no hashes: whether its recipe, "
                        "data and model are those that it began with cannot be verified"
                    )
                check_origin(state.origin, origin, experiment)
                watcher.message(f"resuming: {state.round} of {recipe.rounds} rounds are done")
            # It follows from the data, so a copy that was damaged is written again.
            folder.write_json("partition.json", experiment.counts)
            return _go_on(experiment, folder, state, origin, watcher, rounds or _rounds)


def _say_what_changed(folder: RunFolder, observer: Observer, *, begun: bool) -> None:
    """Report what differs from the machine that began the run; write down which one did."""
    environment = describe_environment()
    if begun:
        for name, was, now in folder.changed_environment(environment):
            observer.message(
                f"{name} was {was} and is {now}: the result may differ in its last bits"
            )
    if not begun or not (folder.path / "environment.json").is_file():
        folder.write_json("environment.json", environment)


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
    origin: Mapping[str, str],
    observer: Observer,
    rounds: Rounds,
) -> dict[str, Any]:
    recipe = experiment.recipe
    # An experiment is built bit for bit the same every time, so a resumed run has its start too.
    start_row = experiment.binding.read()
    if state is None:
        layout = experiment.binding.layout
        state = ServerState(round=0, layout=layout, row=start_row, origin=origin)
        state = _recorded(state, initial_record(experiment, state))
        folder.save(state)
    # Of a run that began without hashes; otherwise it is the same.
    state = replace(state, origin=origin)
    records = folder.rewind_metrics(state)
    folder.discard_after(state.round)
    observer.run_started(recipe.rounds, state.round)
    for after in rounds(experiment, folder, state, observer):
        state = after
        records.append(Round.model_validate(state.record))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = write_adapters(experiment, state, folder.path)
    adapters = [str(path.relative_to(folder.path)) for path in written]
    summary = summarise(experiment, state, records, adapters)
    if experiment.task.generates and len(experiment.test):
        folder.write_json("sample.json", generation_sample(experiment, start_row, state))
    if recipe.evaluation.tasks:
        folder.write_json("answers.json", run_answers(experiment, state, observer))
    folder.write_json("summary.json", summary)
    return summary.plain()


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
        if RunFolder.is_there(path):
            # By what they say: a list and a tuple, 1 and 1.0 are written alike.
            if recipe_digest(RunFolder(path).recipe()) != recipe_digest(trial.recipe):
                raise FedcoreError(f"{path} holds a run of another recipe; choose another --out")
            yield trial, resume(path, observer, cache)
        else:
            yield trial, start(trial.recipe, path, observer, cache)
