"""The models of a run, to be asked: its base, the global one, or those of its clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedcore.answers.bundled import TOPIC_SOURCE, named_task
from fedcore.answers.candidates import BASE, Candidate, Candidates, without_adapter
from fedcore.answers.harness import HarnessTask
from fedcore.answers.outcome import answers_of
from fedcore.answers.scoring import check_tasks
from fedcore.answers.task import AnswerTask
from fedcore.errors import FedcoreError
from fedcore.experiments.client_models import TRAINED, client_row
from fedcore.experiments.observer import Observer
from fedcore.experiments.origin import (
    check_origin,
    check_recipe_kept,
    differences_of_base,
    run_origin,
)
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment, build_experiment
from fedcore.federation.answer_records import Answers
from fedcore.federation.state import ServerState
from fedcore.recipes import Recipe
from fedcore.training.tasks import find_task


@dataclass(frozen=True)
class RunModels:
    """What a run offers to be asked.

    Attributes:
        candidates: its models, the base first.
        source: what its texts are called; empty where sites own them.
        trained: the texts that clients train on; held-out ones are not among them.
    """

    candidates: Candidates
    source: str
    trained: frozenset[str]

    def task(self, name: str, folder: Path | None = None) -> AnswerTask | HarnessTask:
        """The task called ``name``, as :func:`~fedcore.answers.bundled.named_task`, without rows
        that the run trained on.
        """
        known = self.trained if self.source == TOPIC_SOURCE else frozenset()
        return named_task(name, folder, known)


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
        clients: also the model of each client; where they share one, what each of them trained in
            the last round.

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
    experiment = build_experiment(_plain(recipe), observer or Observer())
    differences_of_base(experiment, run, "evaluated")
    check_origin(state.origin, run_origin(experiment, run), experiment)
    return _of_run(experiment, state, clients=clients)


def run_answers(experiment: Experiment, state: ServerState, observer: Observer) -> Answers:
    """What the models of ``state`` answer to ``evaluation.tasks``: the base, the global one, and
    those that the clients trained in the last round, where they are known.

    Raises:
        FedcoreError: as :func:`~fedcore.answers.scoring.score_tasks`.
    """
    settings = experiment.recipe.evaluation
    run = _of_run(experiment, state, clients=bool(_rows(experiment, state)))
    tasks = [run.task(name) for name in settings.tasks or ()]
    return answers_of(
        run.candidates.score(tasks, limit=settings.limit, progress=observer.answers_counted)
    )


def check_answers(recipe: Recipe) -> None:
    """Whether the models of a run of ``recipe`` can be asked what it says, before it begins.

    Raises:
        FedcoreError: an unknown task, or two of one name.
        MissingExtraError: a task needs a package that is not installed.
    """
    if recipe.evaluation.tasks:
        check_tasks([named_task(name) for name in recipe.evaluation.tasks], run_code=False)


def _of_run(experiment: Experiment, state: ServerState, *, clients: bool) -> RunModels:
    rows = (
        Candidate(BASE, (partial(_base, experiment),)),
        *_candidates(experiment, state, clients=clients),
    )
    trained = torch.cat([torch.zeros(0, dtype=torch.int64), *experiment.shards.values()]).tolist()
    return RunModels(
        Candidates(experiment.model, experiment.tokenizer, rows),
        "" if experiment.recipe.data.at_sites else experiment.recipe.data.source,
        frozenset(experiment.texts[i] for i in trained),
    )


def _rows(experiment: Experiment, state: ServerState) -> dict[str, Tensor]:
    """Client to the row of its own model; none of clients that share one and have not trained."""
    if experiment.method.capabilities.personalised or experiment.ranks:
        return {client: client_row(experiment, state, client) for client in experiment.trainers}
    memory = state.simulated_clients
    return {
        client: memory[client][TRAINED] for client in sorted(memory) if TRAINED in memory[client]
    }


def _plain(recipe: Recipe) -> Recipe:
    """The recipe without what is computed for training alone."""
    training = recipe.training.model_copy(update={"reuse_prefix": False})
    return recipe.model_copy(update={"training": training})


def _candidates(
    experiment: Experiment, state: ServerState, *, clients: bool
) -> Iterator[Candidate]:
    capabilities = experiment.method.capabilities
    several = capabilities.personalised
    rows = _rows(experiment, state) if several or clients else {}
    if clients and not rows:
        raise FedcoreError(
            f"--clients: clients of {experiment.method.name} share one model; leave it out, or set "
            "evaluation.tasks, with which a run remembers what each trained in its last round"
        )
    each = {client: partial(_row, experiment, state, row) for client, row in rows.items()}
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
