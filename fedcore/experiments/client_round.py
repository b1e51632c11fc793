"""One client's round: it loads what it was sent, trains, and prepares its upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from secrets import randbits

import torch
from torch import Tensor, nn

from fedcore.data.codecs import Codec, codec_error, find_codec
from fedcore.data.seeding import derive_seed
from fedcore.data.validation import digest
from fedcore.experiments.client_models import OWN, TRAINED
from fedcore.experiments.evaluation import evaluate_on, evaluates
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import SPENT, steps_after
from fedcore.experiments.setup import Experiment
from fedcore.methods.base import Broadcast
from fedcore.privacy.keyed_stream import SECRET_BITS
from fedcore.training.local_training import LocalResult, LocalSettings, train_client
from fedcore.training.private_training import train_privately
from fedcore.tuners.attach import HEADS
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class TrainedClient:
    """What a client's round of training left.

    Attributes:
        upload: ``(P,)`` in the upload layout of the round, as it arrives at the server.
        trained: ``(P,)`` in the read layout, what the upload was made of.
        weight: the client's weight in the round.
        frozen: digest of what the client must not have changed.
        kept: named tensors that stay with the client.
        loss: mean over the local steps; ``nan`` without any.
        accuracy, held_out_loss: of the trained model on the client's held-out shard, where they are
            measured.
        upload_error: what the codec lost, ``||row - decoded|| / ||row||``.
        flags: trouble that the client half met.
    """

    upload: Tensor
    trained: Tensor
    weight: float
    frozen: str
    kept: Mapping[str, Tensor]
    loss: float
    accuracy: float | None
    held_out_loss: float | None
    upload_error: float
    flags: tuple[str, ...]


def train_one_client(
    experiment: Experiment,
    broadcast: Broadcast,
    round: int,
    client: str,
    start: Tensor,
    own: Mapping[str, Tensor],
    observer: Observer,
) -> TrainedClient:
    """Train ``client`` for one round; the base model's residual is loaded already.

    Args:
        broadcast: the global state of the round.
        start: ``(P,)`` in the broadcast's layout, the row that this client starts from.
        own: what the client kept of its last round.
    """
    recipe, method, layout = experiment.recipe, experiment.method, broadcast.layout
    read, frozen = method.read_layout(layout, round), method.frozen_layout(layout, round)
    experiment.binding.load(start)
    result = train_locally(experiment, round, client, own, layout, observer)
    accuracy = held_out_loss = None
    if evaluates(experiment, round) and client in experiment.test_shards:
        evaluation = evaluate_on(experiment, experiment.test_shards[client])
        # Where the held-out rows are a site's own, a mean over few of them would show single rows.
        settings = recipe.evaluation
        if settings.on == "server" or int(evaluation.predictions.sum()) >= settings.min_targets:
            accuracy, held_out_loss = evaluation.accuracy, evaluation.loss
    memory = {**result.state}
    if recipe.privacy.noise_multiplier is not None:
        memory[SPENT] = steps_after(own, result.steps)
    if method.capabilities.personalised:
        memory[OWN] = experiment.binding.read()
    elif recipe.evaluation.tasks and round + 1 == recipe.rounds:
        memory[TRAINED] = experiment.binding.read()
    trained = experiment.binding.read(read)
    upload = method.prepare_upload(trained, read, broadcast, round)
    codec = find_codec(recipe.round.codec)
    received, lost = _transmitted(codec, upload.row, method.upload_layout(layout, round))
    return TrainedClient(
        upload=received,
        trained=trained,
        weight=experiment.weight(client),
        frozen=digest(experiment.binding.read(frozen), frozen, constants(experiment)),
        kept=memory,
        loss=result.loss,
        accuracy=accuracy,
        held_out_loss=held_out_loss,
        upload_error=lost,
        flags=upload.flags,
    )


def train_locally(
    experiment: Experiment,
    round: int,
    client: str,
    own: Mapping[str, Tensor],
    layout: FactorLayout,
    observer: Observer,
) -> LocalResult:
    """Train what the round's plan says from the values that are loaded: by trl, by DP-SGD, or by
    fedcore's own loop.

    Args:
        own: what the client kept of its last round.
        layout: of the global row.
    """
    recipe, method = experiment.recipe, experiment.method
    parameters = experiment.binding.trained(method.plan(round).trains)
    dense = frozenset(slot.name for slot in layout.dense_slots)
    if method.capabilities.whole_model:
        # Every tensor is dense; the head's rate is the head's alone.
        dense = frozenset(name for name in dense if name.split(".")[0] in HEADS)
    optimiser = recipe.optimiser.settings(method)
    # A method that starts a fresh adapter every round leaves nothing to continue with.
    state = {} if method.capabilities.restarts else own
    seed = derive_seed(recipe.seed, "train", round, client)
    indices, local = experiment.training_indices(client), local_settings(experiment)
    if recipe.by_trl:
        # trl is installed where clients train by it alone.
        from fedcore.experiments.sft_client import train_by_trl

        return train_by_trl(
            experiment,
            client,
            parameters,
            dense,
            local,
            optimiser,
            round=round,
            state=state,
            observer=observer,
        )
    private = recipe.privacy.settings()
    if private is None:
        return train_client(
            experiment.forward,
            experiment.examples,
            indices,
            parameters,
            dense,
            local,
            optimiser,
            seed=seed,
            round=round,
            rounds=recipe.rounds,
            state=state,
            on_step=observer.step_done,
        )
    return train_privately(
        experiment.model,
        experiment.forward,
        experiment.examples,
        indices,
        parameters,
        dense,
        local,
        optimiser,
        private,
        seed=randbits(SECRET_BITS) if recipe.privacy.noise == "secret" else seed,
        round=round,
        rounds=recipe.rounds,
        state=state,
        on_step=observer.step_done,
    )


def local_settings(experiment: Experiment) -> LocalSettings:
    """How much one trainer of the recipe trains in a round."""
    return experiment.recipe.local_settings(experiment.method)


def local_steps(experiment: Experiment, client: str) -> int:
    """Optimiser steps of ``client`` in a round."""
    if experiment.recipe.by_trl:
        from fedcore.experiments.sft_client import client_rows

        rows = len(client_rows(experiment, client))
    else:
        rows = len(experiment.training_indices(client))
    return local_settings(experiment).count_steps(rows)


def constants(experiment: Experiment) -> list[Tensor]:
    """The model's buffers that no client may change, in order of their names.

    Frozen embeddings are not among them: they are the base model's, whose identity is compared, and
    no message holds them.
    """
    named = sorted(experiment.binding.constants.items())
    return [tensor for _, tensor in named if not isinstance(tensor, nn.Parameter)]


def drops_out(experiment: Experiment, round: int, client: str) -> bool:
    """Whether ``client`` drops out of ``round``, by the recipe's dropout probability."""
    seed = derive_seed(experiment.recipe.seed, "dropout", round, client)
    draw = torch.rand((), generator=torch.Generator().manual_seed(seed))
    return float(draw) < experiment.recipe.round.dropout


def _transmitted(codec: Codec, row: Tensor, layout: FactorLayout) -> tuple[Tensor, float]:
    """What arrives of an upload, and the relative error that its number format made."""
    if not bool(torch.isfinite(row).all()):
        # The server refuses it by name and value, which not every format could carry.
        return row, float("nan")
    decoded = codec.decode(codec.encode(row, layout), layout)
    return decoded, codec_error(row, decoded)
