"""How good the models are after a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedcore.experiments.client_models import client_row
from fedcore.experiments.setup import Experiment
from fedcore.federation.state import ServerState
from fedcore.training.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Score:
    """Held-out quality.

    Attributes:
        accuracy, loss: of the global model on all held-out examples. Where every client has a
            model of its own, the means over the clients' models, each on all held-out examples.
        clients, client_losses: client id to the accuracy and the loss of the model that it holds,
            on its own held-out shard; empty where clients train alone.
    """

    accuracy: float | None = None
    loss: float | None = None
    clients: Mapping[str, float] = field(default_factory=dict)
    client_losses: Mapping[str, float] = field(default_factory=dict)


def evaluates(experiment: Experiment, round: int) -> bool:
    """Whether the models are evaluated after ``round``: every k rounds and after the last."""
    every, rounds = experiment.recipe.evaluation.every, experiment.recipe.rounds
    return (round + 1) % every == 0 or round + 1 == rounds


def score(experiment: Experiment, state: ServerState) -> Score:
    """The quality of ``state``: of its global model, or of every client's own."""
    experiment.residual.load(state.residual)
    if not experiment.method.capabilities.personalised:
        evaluation = _evaluate_row(experiment, state.row)
        return _score(
            evaluation.accuracy,
            evaluation.loss,
            {c: evaluation.on(s) for c, s in experiment.test_shards.items()},
        )
    accuracies, losses, by_client = [], [], {}
    for client in experiment.trainers:
        evaluation = _evaluate_row(experiment, client_row(experiment, state, client))
        accuracies.append(evaluation.accuracy)
        losses.append(evaluation.loss)
        by_client[client] = evaluation.on(experiment.test_shards[client])
    alone = experiment.method.capabilities.population == "alone"
    count = len(accuracies)
    return _score(sum(accuracies) / count, sum(losses) / count, {} if alone else by_client)


def _score(accuracy: float, loss: float, shards: Mapping[str, Evaluation]) -> Score:
    return Score(
        accuracy,
        loss,
        {client: evaluation.accuracy for client, evaluation in shards.items()},
        {client: evaluation.loss for client, evaluation in shards.items()},
    )


def _evaluate_row(experiment: Experiment, row: Tensor) -> Evaluation:
    experiment.binding.load(row)
    return evaluate(
        experiment.forward,
        experiment.examples,
        experiment.test,
        experiment.recipe.evaluation.batch_size,
        experiment.recipe.evaluation.logits_budget,
    )
