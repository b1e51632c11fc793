"""One federated round in process: sample, train, collect, aggregate, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.seeding import derive_seed
from fedcore.data.validation import digest
from fedcore.experiments.client_models import personalised, with_own
from fedcore.experiments.client_round import constants, drops_out, local_steps, train_one_client
from fedcore.experiments.evaluation import Score, evaluates, score
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import (
    aggregate_centrally,
    aggregate_securely,
    central_record,
    poisson_sample,
    privacy_record,
)
from fedcore.experiments.record import ClientReports, round_record
from fedcore.experiments.setup import Experiment
from fedcore.experiments.traffic import (
    NOTHING,
    added,
    downlink,
    evaluation_downlink,
    together,
    uplink,
)
from fedcore.federation.acceptance import Limits
from fedcore.federation.diagnostics import ModuleDiagnosis, diagnose
from fedcore.federation.downloads import lower_rank_starts
from fedcore.federation.records import Round
from fedcore.federation.row_counts import RowCounts
from fedcore.federation.server_round import Aggregation, OpenRound
from fedcore.federation.state import ServerState
from fedcore.recipes import Recipe

NOTHING_RECORDED = {"round": -1, "accuracy": None, "loss": None}
"""The record of a state that no engine has run from yet."""


@dataclass(frozen=True)
class Trained:
    """What local training left besides the uploads.

    Attributes:
        factors: the clients' trained factors where the uploads are something else, for the
            diagnosis; only an engine that holds all clients has them.
        losses, local_accuracy, local_loss: by client, before aggregation: over its training steps,
            and on its held-out shard.
        clients: client id to what stays with it.
        upload_error: what the codec lost of each client's upload, ``||row - decoded|| / ||row||``.
    """

    factors: Cohort | None
    losses: Mapping[str, float]
    local_accuracy: Mapping[str, float]
    local_loss: Mapping[str, float]
    clients: Mapping[str, Mapping[str, Tensor]]
    upload_error: Mapping[str, float]


def train_clients(
    experiment: Experiment,
    opened: OpenRound,
    sampled: tuple[str, ...],
    starts: Mapping[str, Tensor],
    observer: Observer,
) -> Trained:
    """Train every sampled client, in the order given, and hand its upload to the round.

    Args:
        starts: client id to the row that it starts from, where its rank is lower.
    """
    method, state = experiment.method, opened.state
    layout, t = state.layout, state.round
    shadow = None
    if method.capabilities.uploads == "statistics":
        read = method.read_layout(layout, t)
        shadow = CohortBuilder(read, sampled, round=t, dtype=state.row.dtype)
    losses: dict[str, float] = {}
    lost: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    held_out_loss: dict[str, float] = {}
    clients = {client: dict(tensors) for client, tensors in state.simulated_clients.items()}
    if t == 0 and experiment.rows:
        observer.message(str(RowCounts.sum(experiment.rows.values())))
    observer.round_started(t, len(sampled), sum(local_steps(experiment, c) for c in sampled))
    experiment.residual.load(state.residual)
    for client in sampled:
        if drops_out(experiment, t, client):
            continue
        observer.client_started(client)
        memory = clients.get(client, {})
        start = with_own(experiment, layout, starts.get(client, state.row), memory, t)
        trained = train_one_client(experiment, opened.previous, t, client, start, memory, observer)
        losses[client] = trained.loss
        if trained.accuracy is not None:
            accuracy[client] = trained.accuracy
        if trained.held_out_loss is not None:
            held_out_loss[client] = trained.held_out_loss
        if trained.kept:
            clients[client] = dict(trained.kept)
        lost[client] = trained.upload_error
        ranks, frozen = experiment.ranks.get(client), opened.frozen
        opened.receive(
            client,
            trained.upload,
            trained.weight,
            round=t,
            frozen=trained.frozen,
            expected_frozen=digest(layout.gather(start, frozen), frozen, constants(experiment)),
            ranks=ranks if shadow is None else None,
            flags=trained.flags,
        )
        if shadow is not None:
            shadow.row(client).copy_(trained.trained)
            shadow.receive(client, trained.weight, round=t, ranks=ranks)
    factors = None if shadow is None else shadow.finish("drop")
    return Trained(factors, losses, accuracy, held_out_loss, clients, lost)


def run_round(experiment: Experiment, state: ServerState, observer: Observer) -> ServerState:
    """The state after one more round; ``state`` itself is not changed.

    Raises:
        FedcoreError: an upload is invalid and the recipe says to raise.
    """
    recipe, method, t = experiment.recipe, experiment.method, state.round
    sampled = sample_clients(experiment, t)
    down = downlink(experiment, state, sampled)
    started = perf_counter()
    starts = lower_rank_starts(state, method, sampled, experiment.ranks)
    opened = OpenRound(
        method,
        state,
        sampled,
        on_invalid=recipe.round.on_invalid,
        allow_identical_uploads=recipe.round.allow_identical_uploads,
        starts=starts,
        statistics=experiment.statistics,
        min_cohort=recipe.round.min_cohort if recipe.round.secure_sum else 0,
        limits=Limits(recipe.round.max_growth, recipe.round.largest_share),
    )
    trained = train_clients(experiment, opened, sampled, starts, observer)
    seconds = {"train": perf_counter() - started}

    started = perf_counter()
    # Noise may be longer than all uploads, and a server behind a secure sum sees no norms.
    hidden = recipe.round.secure_sum or recipe.privacy.central.noise_multiplier is not None
    closed = opened.close(_aggregation(experiment), compare_norms=not hidden)
    seconds["aggregate"] = perf_counter() - started
    started = perf_counter()
    modules: list[ModuleDiagnosis] = []
    # A personalised method has no common product that could miss the mean.
    if recipe.evaluation.diagnostics and not method.capabilities.personalised:
        used = (
            closed.cohort if trained.factors is None or not len(closed.cohort) else trained.factors
        )
        factors = method.completed(used, opened.previous)
        modules = diagnose(
            factors, closed.result, opened.previous, method.family, experiment.offset
        )
    seconds["diagnose"] = perf_counter() - started

    started = perf_counter()
    clients = personalised(experiment, state, trained.clients, closed.result.personal)
    after = replace(closed.state, simulated_clients=clients)
    outcome = score(experiment, after) if evaluates(experiment, t) else Score()
    seconds["evaluate"] = perf_counter() - started
    if outcome.sites is not None:
        down = together(down, evaluation_downlink(experiment, after, sorted(experiment.shards)))

    up = uplink(experiment, state, opened.layout, closed.reported)
    after = replace(after, traffic=added(state.traffic, up, down))
    record = round_record(
        experiment,
        t,
        outcome,
        ClientReports(
            trained.losses,
            trained.local_accuracy,
            trained.local_loss,
            rows=experiment.rows if t == 0 else {},
        ),
        sampled=sampled,
        dropped={d.client_id: d.reason for d in closed.cohort.dropped},
        flags=closed.flags,
        up=up,
        down=down,
        seconds=seconds,
        modules=modules,
        upload_error=fmean(trained.upload_error.values()) if trained.upload_error else None,
    )
    before = Round.model_validate(state.record or NOTHING_RECORDED)
    spent = {
        "privacy": privacy_record(recipe, experiment.held, clients, before.privacy),
        "central_privacy": central_record(recipe, t + 1, before.central_privacy),
    }
    record = record.model_copy(update={k: v for k, v in spent.items() if v is not None})
    return replace(after, record=record.plain())


def initial_record(experiment: Experiment, state: ServerState) -> Round:
    """What is known before round 0: how good the untrained model is. Its round is -1."""
    started = perf_counter()
    outcome = score(experiment, state)
    return round_record(
        experiment,
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


def sample_clients(experiment: Experiment, round: int) -> tuple[str, ...]:
    """The clients that take part in ``round``, drawn without replacement, in order of their ids."""
    return sample(experiment.recipe, experiment.trainers, round)


def sample(recipe: Recipe, everyone: tuple[str, ...], round: int) -> tuple[str, ...]:
    """Those of ``everyone``, in order of their ids, that take part in ``round``."""
    if recipe.privacy.central.noise_multiplier is not None:
        return poisson_sample(recipe, everyone, round)
    count = recipe.round.sampled(len(everyone))
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "sample", round))
    chosen = torch.randperm(len(everyone), generator=generator)[:count]
    return tuple(sorted(everyone[i] for i in chosen.tolist()))


def _aggregation(experiment: Experiment) -> Aggregation:
    """The method's server half, behind the noise or the secure sum that the recipe asks for."""
    recipe, method = experiment.recipe, experiment.method
    if recipe.privacy.central.noise_multiplier is not None:
        return partial(aggregate_centrally, recipe, method)
    if recipe.round.secure_sum:
        least = recipe.round.min_cohort
        return partial(aggregate_securely, method, seed=recipe.seed, min_cohort=least)
    return method.aggregate
