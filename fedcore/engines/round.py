"""One federated round in process: sample, train, collect, aggregate, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.seeding import derive_seed
from fedcore.data.server_state import ServerState
from fedcore.data.validation import digest, identical_rows
from fedcore.engines.observer import Observer
from fedcore.engines.workbench import Workbench
from fedcore.errors import FedcoreError
from fedcore.methods.base import Broadcast
from fedcore.methods.diagnostics import diagnose
from fedcore.training.evaluation import Evaluation, evaluate
from fedcore.training.local_training import LocalResult, train_client
from fedcore_kernels.layout import FactorLayout

BYTES_PER_NUMBER = 4
"""Adapters travel as fp32."""


@dataclass(frozen=True)
class Trained:
    """What local training left: the cohort and each client's loss, accuracy, private tensors.

    ``flags`` are those of the uploads, each with its client's name.
    """

    cohort: Cohort
    losses: Mapping[str, float]
    local_accuracy: Mapping[str, float]
    private: Mapping[str, Mapping[str, Tensor]]
    reported: tuple[str, ...]
    flags: tuple[str, ...]


def run_round(bench: Workbench, state: ServerState, observer: Observer) -> ServerState:
    """The state after one more round; ``state`` itself is not changed.

    Raises:
        FedcoreError: an upload is invalid and the recipe says to raise.
    """
    recipe, method, t = bench.recipe, bench.method, state.round
    sampled = sample_clients(bench, t)
    down = _downlink(bench, state, sampled)
    started = perf_counter()
    trained = _train(bench, state, sampled, observer)
    seconds = {"train": perf_counter() - started}

    started = perf_counter()
    previous = Broadcast(state.layout, state.row)
    result = method.aggregate(trained.cohort, previous)
    seconds["aggregate"] = perf_counter() - started
    started = perf_counter()
    modules = []
    if recipe.evaluation.diagnostics and method.population == "clients":
        found = diagnose(trained.cohort, result, previous, method.family, bench.offset)
        modules = [_nullable(asdict(diagnosis)) for diagnosis in found]
    seconds["diagnose"] = perf_counter() - started

    started = perf_counter()
    after = state.advanced(result.row, result.changed, sampled, trained.private)
    outcome = evaluate_state(bench, after) if evaluates(bench, t) else {}
    seconds["evaluate"] = perf_counter() - started

    up = _uplink(bench, trained)
    after = replace(after, traffic=_added(state.traffic, up, down))
    record = {
        "round": t,
        **_quality(outcome),
        "train_loss": _weighted_loss(bench, trained),
        "clients": _client_records(bench, trained, outcome),
        "sampled": list(sampled),
        "dropped": [{"client": d.client_id, "reason": d.reason} for d in trained.cohort.dropped],
        "flags": [*trained.flags, *result.flags],
        "bytes_up": up,
        "bytes_down": down,
        "seconds": seconds,
        "modules": modules,
    }
    return replace(after, record=_nullable(record))


def initial_record(bench: Workbench, state: ServerState) -> dict[str, Any]:
    """What is known before round 0: how good the untrained model is. Its round is -1."""
    started = perf_counter()
    outcome = evaluate_state(bench, state)
    zero = {"adapter": 0, "head": 0}
    record: dict[str, Any] = _nullable(
        {
            "round": -1,
            **_quality(outcome),
            "train_loss": None,
            "clients": [
                {
                    "client": client,
                    "examples": len(bench.shards[client]),
                    "train_loss": None,
                    "global_accuracy": outcome["global_accuracy"].get(client),
                    "local_accuracy": None,
                }
                for client in sorted(bench.shards)
            ],
            "sampled": [],
            "dropped": [],
            "flags": [],
            "bytes_up": zero,
            "bytes_down": zero,
            "seconds": {"evaluate": perf_counter() - started},
            "modules": [],
        }
    )
    return record


def sample_clients(bench: Workbench, round: int) -> tuple[str, ...]:
    """The clients that take part in ``round``, drawn without replacement, in order of their ids."""
    everyone = bench.trainers
    count = max(1, int(bench.recipe.round.participation * len(everyone) + 0.5))
    generator = torch.Generator().manual_seed(derive_seed(bench.recipe.seed, "sample", round))
    chosen = torch.randperm(len(everyone), generator=generator)[:count]
    return tuple(sorted(everyone[i] for i in chosen.tolist()))


def evaluates(bench: Workbench, round: int) -> bool:
    """Whether the models are evaluated after ``round``: every k rounds and after the last."""
    every, rounds = bench.recipe.evaluation.every, bench.recipe.rounds
    return (round + 1) % every == 0 or round + 1 == rounds


def evaluate_state(bench: Workbench, state: ServerState) -> dict[str, Any]:
    """Held-out accuracy and loss, and each client's accuracy on its own held-out shard.

    Where clients train alone there is no global model: accuracy and loss are the means over the
    clients' own models.
    """
    if bench.method.population != "alone":
        found = _evaluate_row(bench, state.row, bench.test)
        shards = {c: found.accuracy_on(shard) for c, shard in bench.test_shards.items()}
        return {"accuracy": found.accuracy, "loss": found.loss, "global_accuracy": shards}
    accuracies, losses = [], []
    for client in bench.trainers:
        row = state.private.get(client, {}).get("row", state.row)
        found = _evaluate_row(bench, row, bench.test)
        accuracies.append(found.accuracy)
        losses.append(found.loss)
    mean = len(accuracies)
    return {
        "accuracy": sum(accuracies) / mean,
        "loss": sum(losses) / mean,
        "global_accuracy": {},
    }


def _train(
    bench: Workbench, state: ServerState, sampled: tuple[str, ...], observer: Observer
) -> Trained:
    recipe, method, t = bench.recipe, bench.method, state.round
    plan = method.plan(t)
    sent = method.upload_layout(state.layout, t)
    frozen = method.frozen_layout(state.layout, t)
    constants = [bench.binding.constants[name] for name in sorted(bench.binding.constants)]
    broadcast = Broadcast(state.layout, state.row)
    expected = digest(state.layout.gather(state.row, frozen), frozen, constants)
    builder = CohortBuilder(sent, sampled, round=t, dtype=state.row.dtype)
    local = recipe.training.settings()
    if method.population == "pooled" and local.steps is not None:
        # As many steps as all clients together would make.
        local = replace(local, steps=local.steps * recipe.clients)
    optimiser = recipe.optimiser.settings(method)
    dense = frozenset(slot.name for slot in state.layout.dense_slots)
    measure = evaluates(bench, t)
    losses: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    private = {client: dict(tensors) for client, tensors in state.private.items()}
    reported: list[str] = []
    flags: list[str] = []
    steps = sum(
        _steps(bench.training_indices(c), local.steps, local.epochs, local.batch_size)
        for c in sampled
    )
    observer.round_started(t, len(sampled), steps)
    for client in sampled:
        if _fails(bench, t, client):
            continue
        observer.client_started(client)
        own = private.get(client, {})
        alone = method.population == "alone"
        bench.binding.load(own.get("row", state.row) if alone else state.row)
        parameters = bench.binding.trained(plan.trains)
        result: LocalResult = train_client(
            bench.forward,
            bench.examples,
            bench.training_indices(client),
            parameters,
            dense,
            local,
            optimiser,
            seed=derive_seed(recipe.seed, "train", t, client),
            state=own,
            on_step=observer.step_done,
        )
        losses[client] = result.loss
        if measure and client in bench.test_shards:
            shard = bench.test_shards[client]
            accuracy[client] = evaluate(
                bench.forward, bench.examples, shard, recipe.evaluation.batch_size
            ).accuracy
        kept = {**result.state}
        if alone:
            kept["row"] = bench.binding.read()
        if kept:
            private[client] = kept
        reported.append(client)
        row = bench.binding.read(sent, out=builder.row(client))
        upload = method.prepare_upload(row, sent, broadcast, t)
        row.copy_(upload.row)
        flags += [f"{client}: {flag}" for flag in upload.flags]
        held = digest(bench.binding.read(frozen), frozen, constants)
        examples = len(bench.training_indices(client))
        weight = float(examples) if recipe.round.weighting == "examples" else 1.0
        builder.receive(client, weight, round=t, frozen=held, expected_frozen=expected)
    cohort = builder.finish(recipe.round.on_invalid)
    _refuse_identical(bench, cohort)
    return Trained(cohort, losses, accuracy, private, tuple(reported), tuple(flags))


def _refuse_identical(bench: Workbench, cohort: Cohort) -> None:
    linear = bench.method.traits.linear
    if linear or bench.recipe.round.allow_identical_uploads or not identical_rows(cohort.updates):
        return
    raise FedcoreError(
        f"round {cohort.round}: all {len(cohort)} uploads are the same bits, which "
        f"{bench.method.name} cannot aggregate usefully; clients did not train, or a sum-only "
        "aggregator replaced their uploads (round.allow_identical_uploads = true accepts it)"
    )


def _fails(bench: Workbench, round: int, client: str) -> bool:
    """Whether ``client`` drops out of ``round``, by the recipe's dropout probability."""
    seed = derive_seed(bench.recipe.seed, "dropout", round, client)
    draw = torch.rand((), generator=torch.Generator().manual_seed(seed))
    return float(draw) < bench.recipe.round.dropout


def _evaluate_row(bench: Workbench, row: Tensor, indices: Tensor) -> Evaluation:
    bench.binding.load(row)
    return evaluate(bench.forward, bench.examples, indices, bench.recipe.evaluation.batch_size)


def _bytes(layout: FactorLayout, times: int = 1) -> dict[str, int]:
    adapter = sum(slot.numel for slot in layout.factor_slots)
    head = sum(slot.numel for slot in layout.dense_slots)
    return {
        "adapter": adapter * BYTES_PER_NUMBER * times,
        "head": head * BYTES_PER_NUMBER * times,
    }


def _uplink(bench: Workbench, trained: Trained) -> dict[str, int]:
    exchanges = bench.method.population == "clients"
    return _bytes(trained.cohort.layout, len(trained.reported) if exchanges else 0)


def _downlink(bench: Workbench, state: ServerState, sampled: tuple[str, ...]) -> dict[str, int]:
    total = {"adapter": 0, "head": 0}
    if bench.method.population == "clients":
        for client in sampled:
            for kind, size in _bytes(state.stale_for(client)).items():
                total[kind] += size
    return total


def _added(
    traffic: Mapping[str, int], up: Mapping[str, int], down: Mapping[str, int]
) -> dict[str, int]:
    found = dict(traffic)
    for direction, sizes in (("up", up), ("down", down)):
        for kind, size in sizes.items():
            key = f"{direction}_{kind}"
            found[key] = found.get(key, 0) + size
    return found


def _quality(outcome: Mapping[str, Any]) -> dict[str, Any]:
    return {"accuracy": outcome.get("accuracy"), "loss": outcome.get("loss")}


def _weighted_loss(bench: Workbench, trained: Trained) -> float:
    total = weight = 0.0
    for client, loss in trained.losses.items():
        if isfinite(loss):
            share = len(bench.training_indices(client))
            total += share * loss
            weight += share
    return total / weight if weight else float("nan")


def _client_records(
    bench: Workbench, trained: Trained, outcome: Mapping[str, Any]
) -> list[dict[str, Any]]:
    shards = outcome.get("global_accuracy", {})
    return [
        {
            "client": client,
            "examples": len(bench.shards[client]),
            "train_loss": trained.losses.get(client),
            "global_accuracy": shards.get(client),
            "local_accuracy": trained.local_accuracy.get(client),
        }
        for client in sorted(bench.shards)
    ]


def _steps(indices: Tensor, steps: int | None, epochs: int, batch: int) -> int:
    return steps if steps is not None else epochs * -(-len(indices) // batch)


def _nullable(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have: they become null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _nullable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nullable(item) for item in value]
    return value
