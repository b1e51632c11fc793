"""One federated round in process: sample, train, collect, aggregate, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.seeding import derive_seed
from fedcore.data.validation import digest, identical_rows
from fedcore.errors import FedcoreError
from fedcore.experiments.client_models import client_row, personalised
from fedcore.experiments.client_round import constants, drops_out, local_settings, take_turn
from fedcore.experiments.evaluation import Score, evaluates, score
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import (
    aggregate_centrally,
    aggregate_securely,
    central_record,
    poisson_sample,
    privacy_record,
)
from fedcore.experiments.record import ClientReports, nullable, round_record
from fedcore.experiments.setup import Workbench
from fedcore.experiments.traffic import NOTHING, added, downlink, uplink
from fedcore.federation.diagnostics import diagnose
from fedcore.federation.state import ServerState
from fedcore.methods.base import Aggregate, Broadcast


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
        if method.capabilities.uploads == "statistics"
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


def run_round(bench: Workbench, state: ServerState, observer: Observer) -> ServerState:
    """The state after one more round; ``state`` itself is not changed.

    Raises:
        FedcoreError: an upload is invalid and the recipe says to raise.
    """
    recipe, method, t = bench.recipe, bench.method, state.round
    sampled = sample_clients(bench, t)
    down = downlink(bench, state, sampled)
    started = perf_counter()
    trained = train_clients(bench, state, sampled, observer)
    _refuse_identical(bench, trained.cohort)
    seconds = {"train": perf_counter() - started}

    started = perf_counter()
    previous = Broadcast(state.layout, state.row)
    result = _aggregate(bench, trained.cohort, previous)
    seconds["aggregate"] = perf_counter() - started
    started = perf_counter()
    modules = []
    # A personalised method has no common product that could miss the mean.
    if recipe.evaluation.diagnostics and not method.capabilities.personalised:
        factors = method.completed(trained.factors or trained.cohort, previous)
        found = diagnose(factors, result, previous, method.family, bench.offset)
        modules = [asdict(diagnosis) for diagnosis in found]
    seconds["diagnose"] = perf_counter() - started

    started = perf_counter()
    private = personalised(bench, state, trained.private, result.personal)
    after = state.advanced(result.row, result.changed, sampled, private, result.residual)
    outcome = score(bench, after) if evaluates(bench, t) else Score()
    seconds["evaluate"] = perf_counter() - started

    up = uplink(bench, state, trained.cohort.layout, trained.reported)
    after = replace(after, traffic=added(state.traffic, up, down))
    record = round_record(
        bench,
        t,
        outcome,
        ClientReports(trained.losses, trained.local_accuracy, trained.local_loss),
        sampled=sampled,
        dropped={d.client_id: d.reason for d in trained.cohort.dropped},
        flags=[*trained.flags, *result.flags],
        up=up,
        down=down,
        seconds=seconds,
        modules=modules,
        upload_error=fmean(trained.upload_error.values()) if trained.upload_error else None,
    )
    privacy = privacy_record(recipe, bench.held, private)
    if privacy is not None:
        record["privacy"] = privacy
    central = central_record(recipe, t + 1)
    if central is not None:
        record["central_privacy"] = central
    return replace(after, record=nullable(record))


def initial_record(bench: Workbench, state: ServerState) -> dict[str, Any]:
    """What is known before round 0: how good the untrained model is. Its round is -1."""
    started = perf_counter()
    outcome = score(bench, state)
    return round_record(
        bench,
        -1,
        outcome,
        ClientReports(),
        sampled=(),
        dropped={},
        flags=(),
        up=NOTHING,
        down=NOTHING,
        seconds={"evaluate": perf_counter() - started},
    )


def sample_clients(bench: Workbench, round: int) -> tuple[str, ...]:
    """The clients that take part in ``round``, drawn without replacement, in order of their ids."""
    everyone = bench.trainers
    if bench.recipe.privacy.central.noise_multiplier is not None:
        return poisson_sample(bench.recipe, everyone, round)
    count = max(1, int(bench.recipe.round.participation * len(everyone) + 0.5))
    generator = torch.Generator().manual_seed(derive_seed(bench.recipe.seed, "sample", round))
    chosen = torch.randperm(len(everyone), generator=generator)[:count]
    return tuple(sorted(everyone[i] for i in chosen.tolist()))


def _aggregate(bench: Workbench, cohort: Cohort, previous: Broadcast) -> Aggregate:
    if bench.recipe.privacy.central.noise_multiplier is not None:
        return aggregate_centrally(bench.recipe, bench.method, cohort, previous)
    if not bench.recipe.round.secure_sum or not len(cohort):
        return bench.method.aggregate(cohort, previous)
    return aggregate_securely(bench.method, cohort, previous, bench.recipe.seed)


def _refuse_identical(bench: Workbench, cohort: Cohort) -> None:
    linear = bench.method.capabilities.linear
    if linear or bench.recipe.round.allow_identical_uploads or not identical_rows(cohort.updates):
        return
    raise FedcoreError(
        f"round {cohort.round}: all {len(cohort)} uploads are the same bits, which "
        f"{bench.method.name} cannot aggregate usefully; clients did not train, or a sum-only "
        "aggregator replaced their uploads (round.allow_identical_uploads = true accepts it)"
    )
