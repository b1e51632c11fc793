"""What is written down of a round, the same in every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from fedcore.experiments.evaluation import Score
from fedcore.experiments.setup import Experiment
from fedcore.federation.diagnostics import ModuleDiagnosis
from fedcore.federation.records import ClientRound, DroppedClient, ModuleRound, Round, Traffic
from fedcore.federation.row_counts import RowCounts


@dataclass(frozen=True)
class ClientReports:
    """What clients say of their training, by name.

    Attributes:
        losses: mean loss of the steps.
        local_accuracy, local_loss: of the model that a client trained, on its own held-out shard.
        examples: training examples by client, of sites whose rows the server does not have, None
            of one that did not say; None where the experiment knows them.
        rows: what became of clients' rows of instruction data, of those that say it now.
    """

    losses: Mapping[str, float] = field(default_factory=dict)
    local_accuracy: Mapping[str, float] = field(default_factory=dict)
    local_loss: Mapping[str, float] = field(default_factory=dict)
    examples: Mapping[str, int | None] | None = None
    rows: Mapping[str, RowCounts] = field(default_factory=dict)


def round_record(
    experiment: Experiment,
    round: int,
    outcome: Score,
    reports: ClientReports,
    *,
    sampled: Sequence[str],
    dropped: Mapping[str, str],
    flags: Sequence[str],
    up: Mapping[str, int],
    down: Mapping[str, int],
    seconds: Mapping[str, float],
    modules: Sequence[ModuleDiagnosis] = (),
    upload_error: float | None = None,
) -> Round:
    """The record of one round.

    Args:
        round: counted from 0; -1 is the state before any.
        dropped: client to the reason why its upload is not in the result.
        up, down: bytes by kind.
        seconds: by what was done in them.
        modules: what the aggregation did to each.
        upload_error: mean relative error of the uploads' number format.
    """
    record = Round(
        index=round,
        accuracy=outcome.accuracy,
        loss=outcome.loss,
        train_loss=_mean_loss(experiment, reports),
        clients=_clients(experiment, outcome, reports),
        sampled=tuple(sampled),
        dropped=tuple(DroppedClient(client=c, reason=r) for c, r in sorted(dropped.items())),
        flags=(*experiment.flags, *flags),
        bytes_up=Traffic(**up),
        bytes_down=Traffic(**down),
        upload_error=upload_error,
        seconds=dict(seconds),
        modules=tuple(ModuleRound(**asdict(module)) for module in modules),
    )
    # A field that says nothing is not written.
    return record if outcome.sites is None else record.model_copy(update={"sites": outcome.sites})


def _mean_loss(experiment: Experiment, reports: ClientReports) -> float:
    """The mean over clients, by their numbers of training examples."""
    total, weight, examples = 0.0, 0.0, reports.examples
    for client, loss in reports.losses.items():
        if isfinite(loss):
            share = 1
            if examples is None:
                share = len(experiment.training_indices(client))
            elif (said := examples.get(client)) is not None:
                share = said
            total += share * loss
            weight += share
    return total / weight if weight else float("nan")


def _clients(
    experiment: Experiment, outcome: Score, reports: ClientReports
) -> tuple[ClientRound, ...]:
    examples = reports.examples
    if examples is None:
        examples = {client: len(rows) for client, rows in experiment.shards.items()}
    rounds = []
    for client in sorted(examples):
        # A field that says nothing is not written.
        optional: dict[str, Any] = {"examples": examples[client], "rows": reports.rows.get(client)}
        rounds.append(
            ClientRound(
                client=client,
                **{name: value for name, value in optional.items() if value is not None},
                train_loss=reports.losses.get(client),
                global_accuracy=outcome.clients.get(client),
                local_accuracy=reports.local_accuracy.get(client),
                global_loss=outcome.client_losses.get(client),
                local_loss=reports.local_loss.get(client),
            )
        )
    return tuple(rounds)
