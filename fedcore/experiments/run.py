"""The default engine: every client in this process, one after the other, one model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fedcore.errors import FedcoreError
from fedcore.experiments.adapters import generation_sample, write_adapters
from fedcore.experiments.environment import describe_environment, git_commit, peak_memory_bytes
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import privacy_summary
from fedcore.experiments.round import initial_record, run_round
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Shelf, Workbench, build_workbench
from fedcore.experiments.trials import Trial, check_sources
from fedcore.federation.measures import Measure, measure_of
from fedcore.federation.state import ServerState
from fedcore.recipes import Recipe, load_recipe

Rounds = Callable[[Workbench, RunFolder, ServerState, Observer], Iterator[ServerState]]
"""What runs the rounds that are left after a state, tells the observer of each, and yields its
state once that is saved in the folder; another engine passes its own."""


def start(
    recipe: Recipe,
    path: Path,
    observer: Observer | None = None,
    shelf: Shelf | None = None,
    rounds: Rounds | None = None,
) -> dict[str, Any]:
    """Run ``recipe`` from the beginning into the empty folder ``path``; returns its summary.

    The state is saved before round 0 and after every round, so a run that is killed at any instant
    goes on with :func:`resume`.

    Raises:
        FedcoreError: the folder is not empty, or anything the recipe names does not exist.
    """
    watcher = observer or Observer()
    check_sources(recipe)
    RunFolder.check_free(path)
    # Nothing is written before everything the recipe names has been found to fit together.
    bench = build_workbench(recipe, watcher, shelf)
    folder = RunFolder.create(path, recipe)
    folder.write_json("environment.json", describe_environment())
    folder.write_json("partition.json", bench.counts)
    return _go_on(bench, folder, None, watcher, rounds or _rounds)


def resume(
    path: Path,
    observer: Observer | None = None,
    shelf: Shelf | None = None,
    rounds: Rounds | None = None,
) -> dict[str, Any]:
    """Continue the run in ``path`` to the bits of a run that was never interrupted.

    The same bits need the same machine, thread count and versions; a difference is reported. A
    finished run is left as it is and its summary returned.

    Raises:
        FedcoreError: ``path`` holds no run, or its state is damaged.
    """
    watcher = observer or Observer()
    folder = RunFolder.open(path)
    finished = folder.summary()
    if finished is not None:
        watcher.message(f"{path} is finished already")
        return finished
    recipe = folder.recipe()
    environment = describe_environment()
    for name, was, now in folder.changed_environment(environment):
        watcher.message(f"{name} was {was} and is {now}: the result may differ in its last bits")
    bench = build_workbench(recipe, watcher, shelf)
    state = folder.latest()
    if state is None:
        folder.write_json("environment.json", environment)
        folder.write_json("partition.json", bench.counts)
    else:
        watcher.message(f"resuming: {state.round} of {recipe.rounds} rounds are done")
    return _go_on(bench, folder, state, watcher, rounds or _rounds)


def _rounds(
    bench: Workbench, folder: RunFolder, state: ServerState, observer: Observer
) -> Iterator[ServerState]:
    save_seconds = 0.0
    while state.round < bench.recipe.rounds:
        state = run_round(bench, state, observer)
        # A state is timed after it is written, so a record carries the save before its own.
        state = _recorded(
            state, {**state.record, "seconds": {**state.record["seconds"], "save": save_seconds}}
        )
        started = perf_counter()
        folder.save(state)
        save_seconds = perf_counter() - started
        observer.round_finished(state.record)
        yield state


def _go_on(
    bench: Workbench,
    folder: RunFolder,
    state: ServerState | None,
    observer: Observer,
    rounds: Rounds,
) -> dict[str, Any]:
    recipe = bench.recipe
    # A workbench is built to the same bits every time, so a resumed run knows its start as well.
    start_row = bench.binding.read()
    if state is None:
        state = ServerState(round=0, layout=bench.binding.layout, row=start_row)
        state = _recorded(state, initial_record(bench, state))
        folder.save(state)
    records = folder.rewind_metrics(state)
    observer.run_started(recipe.rounds, state.round)
    for after in rounds(bench, folder, state, observer):
        state = after
        records.append(dict(state.record))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = write_adapters(bench, state, folder.path)
    summary = summarise(bench, state, records)
    summary["adapters"] = [str(path.relative_to(folder.path)) for path in written]
    if bench.task.generates:
        folder.write_json("sample.json", generation_sample(bench, start_row, state))
    folder.write_json("summary.json", summary)
    return summary


def _recorded(state: ServerState, record: Mapping[str, Any]) -> ServerState:
    return replace(state, record=record)


def summarise(
    bench: Workbench, state: ServerState, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The run in one flat record: quality, traffic, time, memory, versions."""
    recipe = bench.recipe
    measure = measure_of(recipe.task)
    evaluated = [record for record in records if record["accuracy"] is not None]
    last = evaluated[-1]
    quality = [(r["round"], q) for r in evaluated if (q := _quality(measure, r)) is not None]
    target: float | None = getattr(recipe.evaluation, f"target_{measure.name}")
    reached = None
    if target is not None:
        reached = next((t for t, q in quality if t >= 0 and measure.reaches(q, target)), None)
    spread = _client_qualities(bench, measure, last)
    seconds: dict[str, float] = {}
    for record in records:
        for phase, value in record["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    environment = describe_environment()
    traffic = {"up_adapter": 0, "up_head": 0, "down_adapter": 0, "down_head": 0, **state.traffic}
    return {
        "recipe": recipe.name,
        "method": bench.method.name,
        "seed": recipe.seed,
        "rounds": state.round,
        "clients": recipe.clients,
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        measure.name: _quality(measure, last),
        f"best_{measure.name}": measure.best([q for _, q in quality]),
        "worst_client": measure.worst(spread),
        "mean_client": sum(spread) / len(spread) if spread else None,
        "best_client": measure.best(spread),
        "bytes_up": {"adapter": traffic["up_adapter"], "head": traffic["up_head"]},
        "bytes_down": {"adapter": traffic["down_adapter"], "head": traffic["down_head"]},
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "git": git_commit(),
        "versions": environment["versions"],
        "finished": state.round >= recipe.rounds,
        "privacy": privacy_summary(records),
        "central_privacy": records[-1].get("central_privacy"),
        f"target_{measure.name}": target,
        "rounds_to_target": None if reached is None else reached + 1,
        "bytes_to_target": None if reached is None else _bytes_until(records, reached),
    }


def _quality(measure: Measure, values: Mapping[str, Any], whose: str = "") -> float | None:
    return measure.of(values[f"{whose}accuracy"], values[f"{whose}loss"])


def _client_qualities(bench: Workbench, measure: Measure, record: Mapping[str, Any]) -> list[float]:
    """Each client's quality on its own shard: of the global model, or of its own where alone."""
    whose = "local_" if bench.method.capabilities.population == "alone" else "global_"
    found = (_quality(measure, client, whose) for client in record["clients"])
    return [quality for quality in found if quality is not None]


def _bytes_until(records: list[dict[str, Any]], last: int) -> int:
    return sum(
        size
        for record in records
        if record["round"] <= last
        for direction in ("bytes_up", "bytes_down")
        for size in record[direction].values()
    )


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
