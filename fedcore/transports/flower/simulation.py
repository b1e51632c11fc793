"""The flower engine: a recipe on Flower's simulation, its clients in Ray's processes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcore.errors import missing_extra
from fedcore.experiments import run as local
from fedcore.experiments.observer import Observer
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment, SharedCache
from fedcore.federation.state import ServerState
from fedcore.recipes import Recipe, to_toml
from fedcore.transports.flower.apps import check_recipe, client_app, serve
from fedcore.transports.flower.recipe_strategy import RecipeStrategy


def start(
    recipe: Recipe, path: Path, observer: Observer | None = None, cache: SharedCache | None = None
) -> dict[str, Any]:
    """Run ``recipe`` into the empty folder ``path``; returns its summary.

    The run folder is that of the local engine, and so is the adapter, bit for bit, on the same
    machine with the same threads and versions.

    Raises:
        FedcoreError: as the local engine, and a recipe that this engine cannot run.
        MissingExtraError: Ray is not installed.
    """
    check_recipe(recipe)
    local.check_simulated(recipe)
    return local.start(recipe, path, observer, cache, rounds=simulated_rounds)


def resume(
    path: Path,
    observer: Observer | None = None,
    cache: SharedCache | None = None,
    *,
    from_round: int | None = None,
) -> dict[str, Any]:
    """Continue the run in ``path`` from its last complete round, or from that of ``from_round``.

    Optimiser states that clients kept are lost with their processes.

    Raises:
        FedcoreError: as the local engine.
        MissingExtraError: Ray is not installed.
    """
    return local.resume(path, observer, cache, rounds=simulated_rounds, from_round=from_round)


def simulated_rounds(
    experiment: Experiment, folder: RunFolder, state: ServerState, observer: Observer
) -> Iterator[ServerState]:
    """The rounds after ``state``, each by one message per client to a process of Ray's."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise missing_extra("ray", "flower") from error
    from flwr.simulation import run_simulation

    if state.round >= experiment.recipe.rounds:
        return
    done: list[RecipeStrategy] = []
    failed: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            done.append(serve(experiment, folder, grid, observer))
        except BaseException as error:
            # Flower logs what a server raises and ends; a caller is to see it.
            failed.append(error)

    # Ray sets another number of threads in its processes; they are to use this process's.
    threads = torch.get_num_threads()
    training = experiment.recipe.training.model_copy(update={"threads": threads})
    recipe = experiment.recipe.model_copy(update={"training": training})
    cores = max(1, min(threads, os.cpu_count() or 1))
    # Ray hides the cards from processes that do not ask for one.
    on_card = next(experiment.model.parameters()).is_cuda
    with _quiet():
        run_simulation(
            server,
            client_app(partial(_text, to_toml(recipe))),
            num_supernodes=experiment.recipe.clients,
            backend_config={
                "client_resources": {"num_cpus": cores, "num_gpus": float(on_card)},
                "init_args": {"include_dashboard": False, "log_to_driver": False},
            },
        )
    if failed:
        raise failed[0]
    yield from done[0].states


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower and Ray log only what goes wrong: the observer reports the rest."""
    loggers = [logging.getLogger(name) for name in ("flwr", "ray")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # Flower announces an end to the function above, but what replaces it starts processes that
        # outlive the run; Ray announces another default for cards.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _text(recipe: str, context: Context) -> str:
    return recipe
