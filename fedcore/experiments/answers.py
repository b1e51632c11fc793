"""The models of a run, to be asked: its base, the global one, or those of its clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedcore.answers.candidates import BASE, Candidate, Candidates, without_adapter
from fedcore.errors import FedcoreError
from fedcore.experiments.client_models import client_row
from fedcore.experiments.observer import Observer
from fedcore.experiments.origin import (
    check_origin,
    check_recipe_kept,
    differences_of_base,
    run_origin,
)
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment, SharedCache, build_experiment
from fedcore.federation.state import ServerState
from fedcore.recipes import Recipe
from fedcore.training.tasks import find_task


@dataclass(frozen=True)
class RunModels:
    """What a run offers to be asked.

    Attributes:
        candidates: its models, the base first.
        source: what its texts are called.
        trained: the texts that clients train on; held-out ones are not among them.
    """

    candidates: Candidates
    source: str
    trained: frozenset[str]


def run_models(
    folder: Path,
    *,
    round: int | None = None,
    clients: bool = False,
    observer: Observer | None = None,
) -> RunModels:
    """The models of the run in ``folder``, which is read and not changed.

    They are ``base`` and ``global``; of a centralised run ``base`` and ``centralised``; where every
    client has a model of its own, ``base`` and the mean over the clients' models, called
    ``local-only, mean`` where they train alone and ``clients, mean`` otherwise.

    Args:
        round: after so many rounds; after the newest one by default.
        clients: also the model of each client.

    Raises:
        FedcoreError: the folder holds no run of a language model, or none after ``round``; its
            state, recipe, data or base model are not what they were; ``clients`` of a run whose
            clients share one model.
    """
    run = RunFolder.open(folder)
    recipe = run.recipe()
    if not find_task(recipe.task).generates:
        raise FedcoreError(
            f"{folder} is a run of task {recipe.task!r}, whose models answer nothing; its "
            "accuracies are in its report. Pass a run of task 'causal' or 'sft'"
        )
    state = run.state(round)
    if state is None:
        raise FedcoreError(f"{folder} has no state yet; continue it: fedcore run --resume {folder}")
    check_recipe_kept(state.origin, run)
    cache = SharedCache()
    experiment = build_experiment(_plain(recipe), observer or Observer(), cache)
    differences_of_base(experiment, run, "evaluated")
    check_origin(state.origin, run_origin(experiment, run), experiment)
    ((texts, encoded),) = cache.texts.values()
    training = torch.cat(list(experiment.shards.values())).numpy()
    if encoded.rows is not None:
        training = encoded.rows.positions[training]
    rows = (
        Candidate(BASE, (partial(_base, experiment),)),
        *_candidates(experiment, state, clients=clients),
    )
    return RunModels(
        Candidates(experiment.model, experiment.tokenizer, rows),
        recipe.data.source,
        frozenset(texts.take(training).texts),
    )


def _plain(recipe: Recipe) -> Recipe:
    """The recipe without what is computed for training alone."""
    training = recipe.training.model_copy(update={"reuse_prefix": False})
    return recipe.model_copy(update={"training": training})


def _candidates(
    experiment: Experiment, state: ServerState, *, clients: bool
) -> Iterator[Candidate]:
    capabilities = experiment.method.capabilities
    several = capabilities.personalised
    if clients and not (several or experiment.ranks):
        raise FedcoreError(
            f"--clients: clients of {experiment.method.name} share one model; leave it out"
        )
    each = {
        client: partial(_row, experiment, state, client_row(experiment, state, client))
        for client in (experiment.trainers if several or clients else ())
    }
    if several:
        alone = capabilities.population == "alone"
        yield Candidate("local-only, mean" if alone else "clients, mean", tuple(each.values()))
    else:
        name = "centralised" if capabilities.population == "pooled" else "global"
        yield Candidate(name, (partial(_row, experiment, state, state.row),))
    if clients:
        for client, member in each.items():
            yield Candidate(client, (member,))


@contextmanager
def _base(experiment: Experiment) -> Iterator[None]:
    experiment.residual.load({})
    with without_adapter(experiment.model):
        yield


@contextmanager
def _row(experiment: Experiment, state: ServerState, row: Tensor) -> Iterator[None]:
    experiment.residual.load(state.residual)
    experiment.binding.load(row)
    try:
        yield
    finally:
        experiment.residual.load({})
