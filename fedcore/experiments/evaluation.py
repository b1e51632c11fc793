"""How good the models are after a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import fsum

from torch import Tensor

from fedcore.experiments.client_models import client_row
from fedcore.experiments.setup import Experiment
from fedcore.federation.records import SitesEvaluation
from fedcore.federation.state import ServerState
from fedcore.training.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Score:
    """Held-out quality.

    Attributes:
        accuracy, loss: of the global model on all held-out examples, or on those of the sites that
            answered. Where every client has a model of its own, the means over the clients'
            models, each on all held-out examples.
        clients, client_losses: client id to the accuracy and the loss of the model that it holds,
            on its own held-out shard; empty where clients train alone.
        sites: what the sites' sums make, where ``evaluation.on`` says so.
    """

    accuracy: float | None = None
    loss: float | None = None
    clients: Mapping[str, float] = field(default_factory=dict)
    client_losses: Mapping[str, float] = field(default_factory=dict)
    sites: SitesEvaluation | None = None


@dataclass(frozen=True)
class SiteSums:
    """What a site answers to an evaluation: sums over its held-out rows, never rates.

    Attributes:
        examples: its held-out rows.
        targets: predictions that they ask for.
        correct: how many were right.
        loss: their cross-entropies in nats, summed.
    """

    examples: int
    targets: int
    correct: int
    loss: float


def evaluates(experiment: Experiment, round: int) -> bool:
    """Whether the models are evaluated after ``round``: every k rounds and after the last."""
    every, rounds = experiment.recipe.evaluation.every, experiment.recipe.rounds
    return (round + 1) % every == 0 or round + 1 == rounds


def score(experiment: Experiment, state: ServerState) -> Score:
    """The quality of ``state``: of its global model, or of every client's own."""
    experiment.residual.load(state.residual)
    if not experiment.method.capabilities.personalised:
        if experiment.recipe.evaluation.on == "server":
            return server_score(experiment, state)
        experiment.binding.load(state.row)
        sums = {client: site_sums(experiment, client) for client in sorted(experiment.shards)}
        answered = {client: of_site for client, of_site in sums.items() if of_site is not None}
        return with_sites(experiment, state, answered)
    accuracies, losses, by_client = [], [], {}
    for client in experiment.trainers:
        evaluation = _evaluate_row(experiment, client_row(experiment, state, client))
        accuracies.append(evaluation.accuracy)
        losses.append(evaluation.loss)
        by_client[client] = evaluation.on(experiment.test_shards[client])
    alone = experiment.method.capabilities.population == "alone"
    count = len(accuracies)
    return _score(sum(accuracies) / count, sum(losses) / count, {} if alone else by_client)


def server_score(experiment: Experiment, state: ServerState) -> Score:
    """The quality of the global model of ``state`` on the held-out rows of this process."""
    experiment.residual.load(state.residual)
    evaluation = _evaluate_row(experiment, state.row)
    return _score(
        evaluation.accuracy,
        evaluation.loss,
        {c: evaluation.on(s) for c, s in experiment.test_shards.items()},
    )


def site_sums(experiment: Experiment, client: str) -> SiteSums | None:
    """The sums of the model as it is loaded over the held-out rows of ``client``.

    None below ``evaluation.min_targets`` predictions, whose sums would show single rows.
    """
    shard = experiment.test_shards[client]
    outcome = evaluate_on(experiment, shard)
    targets = int(outcome.predictions.sum())
    if targets < experiment.recipe.evaluation.min_targets:
        return None
    loss = float(outcome.losses.double().sum())
    return SiteSums(len(shard), targets, int(outcome.correct.sum()), loss)


def with_sites(experiment: Experiment, state: ServerState, sums: Mapping[str, SiteSums]) -> Score:
    """The quality by the sites' ``sums``, divided once, so that every prediction weighs alike;
    with ``evaluation.on = "both"`` beside that on the server's own rows.
    """
    targets = sum(of_site.targets for of_site in sums.values())
    correct = sum(of_site.correct for of_site in sums.values())
    loss = fsum(of_site.loss for of_site in sums.values())
    sites = SitesEvaluation(
        accuracy=correct / targets if targets else None,
        loss=loss / targets if targets else None,
        targets=targets,
        examples=sum(of_site.examples for of_site in sums.values()),
        answered=tuple(sorted(sums)),
    )
    if experiment.recipe.evaluation.on == "both":
        return replace(server_score(experiment, state), sites=sites)
    return Score(
        sites.accuracy,
        sites.loss,
        {site: of_site.correct / of_site.targets for site, of_site in sums.items()},
        {site: of_site.loss / of_site.targets for site, of_site in sums.items()},
        sites,
    )


def _score(accuracy: float, loss: float, shards: Mapping[str, Evaluation]) -> Score:
    return Score(
        accuracy,
        loss,
        {client: evaluation.accuracy for client, evaluation in shards.items()},
        {client: evaluation.loss for client, evaluation in shards.items()},
    )


def evaluate_on(experiment: Experiment, indices: Tensor) -> Evaluation:
    """The outcome of the model as it is loaded on the examples ``indices``."""
    settings = experiment.recipe.evaluation
    return evaluate(
        experiment.forward,
        experiment.examples,
        indices,
        settings.batch_size,
        settings.logits_budget,
    )


def _evaluate_row(experiment: Experiment, row: Tensor) -> Evaluation:
    experiment.binding.load(row)
    return evaluate_on(experiment, experiment.test)
