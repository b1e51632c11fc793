"""One federated round in process: sample, train, collect, aggregate, evaluate."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from time import perf_counter

import torch

from fedcore.data.cohort import Cohort
from fedcore.data.seeding import derive_seed
from fedcore.data.server_state import ServerState
from fedcore.data.validation import identical_rows
from fedcore.engines.client_models import personalised
from fedcore.engines.client_turns import train_clients
from fedcore.engines.observer import Observer
from fedcore.engines.private_clients import privacy_record
from fedcore.engines.private_rounds import (
    aggregate_centrally,
    central_record,
    poisson_sample,
)
from fedcore.engines.round_record import ClientReports, round_record
from fedcore.engines.scoring import Score, evaluates, score
from fedcore.engines.secure_round import aggregate_securely
from fedcore.engines.traffic import NOTHING, added, downlink, uplink
from fedcore.engines.workbench import Workbench
from fedcore.errors import FedcoreError
from fedcore.federation.records import Round
from fedcore.methods.base import Aggregate, Broadcast
from fedcore.methods.diagnostics import ModuleDiagnosis, diagnose


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
    modules: list[ModuleDiagnosis] = []
    # A personalised method has no common product that could miss the mean.
    if recipe.evaluation.diagnostics and not method.traits.personalised:
        factors = method.completed(trained.factors or trained.cohort, previous)
        modules = diagnose(factors, result, previous, method.family, bench.offset)
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
    spent = {
        "privacy": privacy_record(recipe, bench.held, private),
        "central_privacy": central_record(recipe, t + 1),
    }
    record = record.model_copy(update={k: v for k, v in spent.items() if v is not None})
    return replace(after, record=record.plain())


def initial_record(bench: Workbench, state: ServerState) -> Round:
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
    linear = bench.method.traits.linear
    if linear or bench.recipe.round.allow_identical_uploads or not identical_rows(cohort.updates):
        return
    raise FedcoreError(
        f"round {cohort.round}: all {len(cohort)} uploads are the same bits, which "
        f"{bench.method.name} cannot aggregate usefully; clients did not train, or a sum-only "
        "aggregator replaced their uploads (round.allow_identical_uploads = true accepts it)"
    )
