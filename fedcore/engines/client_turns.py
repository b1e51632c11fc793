"""The clients' part of a round: each trains the one model in memory and sends its upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcore.data.codecs import Codec, codec_error, find_codec
from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.seeding import derive_seed
from fedcore.data.server_state import ServerState
from fedcore.data.validation import digest
from fedcore.engines.client_models import HELD, OWN, client_row
from fedcore.engines.observer import Observer
from fedcore.engines.scoring import evaluates
from fedcore.engines.workbench import Workbench
from fedcore.methods.base import Broadcast
from fedcore.training.evaluation import evaluate
from fedcore.training.local_training import train_client
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class Trained:
    """What local training left.

    Attributes:
        cohort: the uploads.
        factors: the same clients' trained factors where the uploads are something else, for the
            diagnosis; only an engine that holds all clients has them.
        losses, local_accuracy: by client, before aggregation.
        private: client id to what stays with it.
        reported: the clients that sent an upload.
        flags: those of the uploads, each with its client's name.
        upload_error: what the codec lost of each client's upload, ``||row - decoded|| / ||row||``.
    """

    cohort: Cohort
    factors: Cohort | None
    losses: Mapping[str, float]
    local_accuracy: Mapping[str, float]
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
    recipe, method, t = bench.recipe, bench.method, state.round
    layout = state.layout
    plan = method.plan(t)
    sent, read = method.upload_layout(layout, t), method.read_layout(layout, t)
    frozen = method.frozen_layout(layout, t)
    constants = [bench.binding.constants[name] for name in sorted(bench.binding.constants)]
    builder = CohortBuilder(sent, sampled, round=t, dtype=state.row.dtype)
    shadow = (
        CohortBuilder(read, sampled, round=t, dtype=state.row.dtype)
        if method.uploads == "statistics"
        else None
    )
    local = recipe.training.settings()
    if method.population == "pooled" and local.steps is not None:
        # As many steps as all clients together would make.
        local = replace(local, steps=local.steps * recipe.clients)
    optimiser = recipe.optimiser.settings(method)
    dense = frozenset(slot.name for slot in layout.dense_slots)
    measure = evaluates(bench, t)
    codec = find_codec(recipe.round.codec)
    losses: dict[str, float] = {}
    lost: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    private = {client: dict(tensors) for client, tensors in state.private.items()}
    reported: list[str] = []
    flags: list[str] = []
    observer.round_started(
        t, len(sampled), sum(local.count_steps(len(bench.training_indices(c))) for c in sampled)
    )
    bench.residual.load(state.residual)
    for client in sampled:
        if _fails(bench, t, client):
            continue
        observer.client_started(client)
        own = private.get(client, {})
        start = client_row(bench, state, client)
        bench.binding.load(start)
        result = train_client(
            bench.forward,
            bench.examples,
            bench.training_indices(client),
            bench.binding.trained(plan.trains),
            dense,
            local,
            optimiser,
            seed=derive_seed(recipe.seed, "train", t, client),
            # A method that starts a fresh adapter every round leaves nothing to go on with.
            state={} if method.restarts else own,
            on_step=observer.step_done,
        )
        losses[client] = result.loss
        if measure and client in bench.test_shards:
            shard = bench.test_shards[client]
            accuracy[client] = evaluate(
                bench.forward, bench.examples, shard, recipe.evaluation.batch_size
            ).accuracy
        kept = {**result.state}
        if method.traits.personalised:
            kept[OWN] = bench.binding.read()
        if client in bench.ranks:
            kept[HELD] = start
        if kept:
            private[client] = kept
        reported.append(client)
        trained = bench.binding.read(read)
        upload = method.prepare_upload(trained, read, Broadcast(layout, state.row), t)
        received, lost[client] = _transmitted(codec, upload.row, sent)
        builder.row(client).copy_(received)
        flags += [f"{client}: {flag}" for flag in upload.flags]
        examples = len(bench.training_indices(client))
        weight = float(examples) if recipe.round.weighting == "examples" else 1.0
        builder.receive(
            client,
            weight,
            round=t,
            frozen=digest(bench.binding.read(frozen), frozen, constants),
            expected_frozen=digest(layout.gather(start, frozen), frozen, constants),
            ranks=bench.ranks.get(client) if shadow is None else None,
        )
        if shadow is not None:
            shadow.row(client).copy_(trained)
            shadow.receive(client, weight, round=t, ranks=bench.ranks.get(client))
    cohort = builder.finish(recipe.round.on_invalid)
    told = {c: bench.statistics[c] for c in cohort.client_ids if c in bench.statistics}
    return Trained(
        replace(cohort, statistics=told),
        shadow.finish("drop") if shadow is not None else None,
        losses,
        accuracy,
        private,
        tuple(reported),
        tuple(flags),
        lost,
    )


def _transmitted(codec: Codec, row: Tensor, layout: FactorLayout) -> tuple[Tensor, float]:
    """What arrives of an upload, and the relative error that its number format made."""
    if not bool(torch.isfinite(row).all()):
        # The server refuses it by name and value, which not every format could carry.
        return row, float("nan")
    decoded = codec.decode(codec.encode(row, layout), layout)
    return decoded, codec_error(row, decoded)


def _fails(bench: Workbench, round: int, client: str) -> bool:
    """Whether ``client`` drops out of ``round``, by the recipe's dropout probability."""
    seed = derive_seed(bench.recipe.seed, "dropout", round, client)
    draw = torch.rand((), generator=torch.Generator().manual_seed(seed))
    return float(draw) < bench.recipe.round.dropout
