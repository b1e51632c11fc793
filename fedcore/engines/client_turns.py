"""The clients' part of a round: each trains the one model in memory and sends its upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.server_state import ServerState
from fedcore.data.validation import digest
from fedcore.engines.client_models import client_row
from fedcore.engines.client_turn import constants, drops_out, local_settings, take_turn
from fedcore.engines.observer import Observer
from fedcore.engines.workbench import Workbench
from fedcore.methods.base import Broadcast


@dataclass(frozen=True)
class Trained:
    """What local training left.

    Attributes:
        cohort: the uploads.
        factors: the same clients' trained factors where the uploads are something else, for the
            diagnosis; only an engine that holds all clients has them.
        losses, local_accuracy, local_loss: by client, before aggregation: over its training steps,
            and on its held-out shard.
        private: client id to what stays with it.
        reported: the clients that sent an upload.
        flags: those of the uploads, each with its client's name.
        upload_error: what the codec lost of each client's upload, ``||row - decoded|| / ||row||``.
    """

    cohort: Cohort
    factors: Cohort | None
    losses: Mapping[str, float]
    local_accuracy: Mapping[str, float]
    local_loss: Mapping[str, float]
    private: Mapping[str, Mapping[str, Tensor]]
    reported: tuple[str, ...]
    flags: tuple[str, ...]
    upload_error: Mapping[str, float]


def train_clients(
    bench: Workbench, state: ServerState, sampled: tuple[str, ...], observer: Observer
) -> Trained:
    """Every sampled client's turn, in the order given; ``state`` is not changed.

    Raises:
        FedcoreError: an upload is invalid and the recipe says to raise.
    """
    method, layout, t = bench.method, state.layout, state.round
    sent, read = method.upload_layout(layout, t), method.read_layout(layout, t)
    frozen = method.frozen_layout(layout, t)
    builder = CohortBuilder(sent, sampled, round=t, dtype=state.row.dtype)
    shadow = (
        CohortBuilder(read, sampled, round=t, dtype=state.row.dtype)
        if method.uploads == "statistics"
        else None
    )
    losses: dict[str, float] = {}
    lost: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    held_out_loss: dict[str, float] = {}
    private = {client: dict(tensors) for client, tensors in state.private.items()}
    reported: list[str] = []
    flags: list[str] = []
    local = local_settings(bench)
    observer.round_started(
        t, len(sampled), sum(local.count_steps(len(bench.training_indices(c))) for c in sampled)
    )
    bench.residual.load(state.residual)
    for client in sampled:
        if drops_out(bench, t, client):
            continue
        observer.client_started(client)
        start = client_row(bench, state, client)
        own = private.get(client, {})
        turn = take_turn(bench, Broadcast(layout, state.row), t, client, start, own, observer)
        losses[client] = turn.loss
        if turn.accuracy is not None:
            accuracy[client] = turn.accuracy
        if turn.held_out_loss is not None:
            held_out_loss[client] = turn.held_out_loss
        if turn.kept:
            private[client] = dict(turn.kept)
        reported.append(client)
        lost[client] = turn.upload_error
        flags += [f"{client}: {flag}" for flag in turn.flags]
        builder.row(client).copy_(turn.upload)
        builder.receive(
            client,
            turn.weight,
            round=t,
            frozen=turn.frozen,
            expected_frozen=digest(layout.gather(start, frozen), frozen, constants(bench)),
            ranks=bench.ranks.get(client) if shadow is None else None,
        )
        if shadow is not None:
            shadow.row(client).copy_(turn.trained)
            shadow.receive(client, turn.weight, round=t, ranks=bench.ranks.get(client))
    cohort = builder.finish(bench.recipe.round.on_invalid)
    told = {c: bench.statistics[c] for c in cohort.client_ids if c in bench.statistics}
    return Trained(
        replace(cohort, statistics=told),
        shadow.finish("drop") if shadow is not None else None,
        losses,
        accuracy,
        held_out_loss,
        private,
        tuple(reported),
        tuple(flags),
        lost,
    )
