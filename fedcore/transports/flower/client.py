"""The client half: a message in, training by the recipe, a reply out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from logging import WARNING
from math import isfinite

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor

from fedcore.data.adapter_kind import kind_of
from fedcore.data.announcement import (
    Announcement,
    broadcast_identity,
    differences,
    scalings_of,
)
from fedcore.data.low_rank import LowRank, packed, unpacked
from fedcore.errors import FedcoreError
from fedcore.experiments.client_models import OWN, with_own
from fedcore.experiments.client_round import drops_out, train_one_client
from fedcore.experiments.evaluation import site_sums
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import check_local
from fedcore.experiments.setup import Experiment
from fedcore.methods.base import Broadcast
from fedcore.transports.flower.messages import (
    BROADCAST,
    PERSONAL,
    RECORD,
    RESIDUAL,
    TOLD,
    KeyMap,
    ReplyInfo,
    RoundConfig,
    from_arrays,
    to_arrays,
)
from fedcore.transports.flower.reply_metrics import (
    CORRECT,
    EXAMPLES,
    LOSS_SUM,
    METRICS,
    TARGETS,
    row_metrics,
)

_ROW, _OWN, _RESIDUAL, _RUN = (f"fedcore.{name}" for name in ("row", "own", "residual", "run"))


@dataclass(frozen=True)
class ClientMemory:
    """A client's memory.

    Attributes:
        row: ``(P,)`` the shared row of the last round, None before the first.
        own: named tensors that stay with the client.
        residual: module to the update of the base weights.
    """

    row: Tensor | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Mapping[str, LowRank] = field(default_factory=dict)

    @classmethod
    def read(cls, state: RecordDict, run: str) -> ClientMemory:
        """The memory of ``run`` in a context's ``state``; an empty one where that is another's."""
        if _RUN not in state.config_records or state.config_records[_RUN]["run"] != run:
            return cls()
        tensors = {
            name: from_arrays(state.array_records[name])
            for name in (_ROW, _OWN, _RESIDUAL)
            if name in state.array_records
        }
        return cls(
            tensors[_ROW]["row"], tensors.get(_OWN, {}), unpacked(tensors.get(_RESIDUAL, {}))
        )

    def write(self, state: RecordDict, run: str) -> None:
        """Put the memory into a context's ``state``, in place of what is there."""
        state[_RUN] = ConfigRecord({"run": run})
        for name, tensors in (
            (_ROW, {} if self.row is None else {"row": self.row}),
            (_OWN, self.own),
            (_RESIDUAL, packed(self.residual)),
        ):
            if tensors:
                state[name] = to_arrays(tensors)
            elif name in state:
                del state[name]


ARRAYS = "arrays"

DROPPED_OUT = 4101
"""The code of the error by which a client says that it drops out of a round, as the recipe asks."""


def model_tensors(experiment: Experiment) -> dict[str, Tensor]:
    """The model's adapter, constants and dense tensors, by PEFT's keys with the adapter's name."""
    bound = {id(parameter) for parameter in experiment.binding.parameters.values()}
    fixed = {id(buffer) for buffer in experiment.binding.constants.values()}
    tensors = {
        key: tensor.detach().cpu().clone()
        for key, tensor in experiment.model.named_parameters()
        if id(tensor) in bound
    }
    return tensors | {
        key: buffer.detach().cpu().clone()
        for key, buffer in experiment.model.named_buffers()
        if id(buffer) in fixed
    }


def introduce(message: Message, client: str) -> Message:
    """The answer to the server's question who this node is, and on how many threads."""
    reply = ReplyInfo(client, threads=torch.get_num_threads())
    return Message(RecordDict({RECORD: reply.record()}), reply_to=message)


def train(
    message: Message, context: Context, experiment: Experiment, client: str, run: str = ""
) -> Message:
    """One client's round, to the local engine's bits (same machine, threads and versions).

    Args:
        message: as :class:`FedLoRA` sends it.
        context: of the node; what the client keeps is kept there.
        client: its id in the recipe.
        run: of which run the client's memory may be.

    Returns:
        The upload; or, where the client's adapter or base is not what the message announces, what
        they are, so that the server refuses it by name. Nothing was trained then.

    Raises:
        FedcoreError: a message that does not fit the recipe, or one that holds a part of the
            adapter for a client that has lost the rest.
    """
    check_local(experiment.recipe, "Flower")
    content = message.content
    round_config = RoundConfig.read(content)
    if round_config.method != experiment.method.name:
        raise FedcoreError(
            f"the server runs {round_config.method}, this client's recipe says "
            f"{experiment.method.name}; give both the same recipe"
        )
    if drops_out(experiment, round_config.round, client):
        reason = f"{client} drops out of round {round_config.round}"
        return Message(Error(code=DROPPED_OUT, reason=reason), reply_to=message)
    announced, said = round_config.announced, None
    if announced is not None:
        said = own_announcement(experiment, announced)
        problem, _ = differences(said, announced, allow=announced.allow)
        if problem is not None:
            log(WARNING, "%s does not train in round %s: %s", client, round_config.round, problem)
            refusal = ReplyInfo(client, round_config.round, said=said).record()
            return Message(RecordDict({RECORD: refusal}), reply_to=message)
    key_map, _ = KeyMap.of(model_tensors(experiment))
    before = ClientMemory.read(context.state, run)
    memory = _updated(before, content, round_config, key_map, experiment, client)
    assert memory.row is not None
    layout, ranks = key_map.layout, experiment.ranks.get(client)
    if announced is not None and ranks is None:
        _check_start(memory, announced, key_map, client)
    broadcast = memory.row
    if BROADCAST in content.array_records:
        broadcast = key_map.unpack(from_arrays(content.array_records[BROADCAST]), layout)
    experiment.residual.load(memory.residual)
    trained = train_one_client(
        experiment,
        Broadcast(layout, broadcast),
        round_config.round,
        client,
        with_own(experiment, layout, memory.row, memory.own, round_config.round),
        memory.own,
        Observer(),
    )
    replace(memory, own=trained.kept or memory.own).write(context.state, run)
    sent = experiment.method.upload_layout(layout, round_config.round)
    whole = experiment.method.capabilities.uploads == "statistics"
    tensors = key_map.pack(trained.upload, sent, None if whole else ranks)
    if experiment.recipe.round.codec == "bf16":
        # They are rounded already, so this changes their size alone.
        tensors = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    measured = {
        "train-loss": trained.loss,
        "local-accuracy": trained.accuracy,
        "local-loss": trained.held_out_loss,
    }
    # A server takes finite numbers alone; what was not measured is left out as well.
    metrics: dict[str, float] = {EXAMPLES: float(len(experiment.training_indices(client)))}
    if experiment.recipe.round.weighting == "tokens":
        metrics[TARGETS] = trained.weight
    if before.row is None and client in experiment.rows:
        metrics |= row_metrics(experiment.rows[client])
    metrics |= {name: v for name, v in measured.items() if v is not None and isfinite(v)}
    answer = RecordDict(
        {
            ARRAYS: to_arrays(tensors),
            METRICS: MetricRecord(dict(metrics)),
            RECORD: ReplyInfo(
                client, round_config.round, trained.frozen, trained.flags, said=said
            ).record(),
        }
    )
    if round_config.tell and client in experiment.statistics:
        answer[TOLD] = to_arrays(experiment.statistics[client])
    return Message(answer, reply_to=message)


def evaluate_global(message: Message, experiment: Experiment, client: str) -> Message:
    """A client's sums over its held-out rows with the adapter that ``message`` brings as a whole.

    What the client remembers of the run is not touched. With fewer predictions than
    ``evaluation.min_targets`` the reply holds none of them.

    Raises:
        FedcoreError: a message that does not fit the recipe.
    """
    content = message.content
    round_config = RoundConfig.read(content)
    if not round_config.whole:
        raise FedcoreError("an evaluation needs the whole adapter, and the message has a part")
    key_map, _ = KeyMap.of(model_tensors(experiment))
    given = _updated(ClientMemory(), content, round_config, key_map, experiment, client)
    assert given.row is not None
    experiment.residual.load(given.residual)
    experiment.binding.load(given.row)
    sums = site_sums(experiment, client)
    answer = RecordDict({RECORD: ReplyInfo(client, round_config.round).record()})
    if sums is not None:
        answer[METRICS] = MetricRecord(
            {
                EXAMPLES: sums.examples,
                TARGETS: sums.targets,
                CORRECT: sums.correct,
                LOSS_SUM: sums.loss,
            }
        )
    return Message(answer, reply_to=message)


def own_announcement(experiment: Experiment, announced: Announcement) -> Announcement:
    """What a client of ``experiment`` answers to what a message announces."""
    config = experiment.adapter_config
    if config is None:
        return announced.answer(experiment.base, {}, {})
    scaling = scalings_of(config, experiment.binding.layout.modules)
    return announced.answer(experiment.base, kind_of(config), scaling)


def _check_start(
    memory: ClientMemory, announced: Announcement, key_map: KeyMap, client: str
) -> None:
    """Refuse to train from a memory of another broadcast than the message's."""
    assert memory.row is not None
    identity = broadcast_identity(memory.row, key_map.layout, key_map.constants, memory.residual)
    if identity != announced.broadcast:
        raise FedcoreError(
            f"what {client} remembers and the partial update it received are not the broadcast of "
            f"round {announced.round}; the server sends it the whole adapter in its next round"
        )


def _updated(
    memory: ClientMemory,
    content: RecordDict,
    round_config: RoundConfig,
    key_map: KeyMap,
    experiment: Experiment,
    client: str,
) -> ClientMemory:
    """The memory with what the message brings."""
    arrays = {
        name: from_arrays(record)
        for name, record in content.array_records.items()
        if name not in (PERSONAL, RESIDUAL, BROADCAST)
    }
    if len(arrays) != 1:
        raise FedcoreError(f"the message has {len(arrays)} array records; one is needed")
    tensors = next(iter(arrays.values()))
    part = key_map.part_of(tensors)
    if memory.row is None and not round_config.whole:
        raise FedcoreError(
            f"{client} has lost its state for this run but received a partial update; the server "
            "sends it the whole adapter in its next round"
        )
    news = key_map.unpack(tensors, part, experiment.ranks.get(client))
    layout = key_map.layout
    row = memory.row
    if row is None or round_config.whole:
        row = torch.zeros(layout.size, dtype=news.dtype)
    row = layout.scatter(row, part, news)
    private = dict(memory.own)
    if PERSONAL in content.array_records:
        mine = from_arrays(content.array_records[PERSONAL])
        personal = key_map.part_of(mine)
        private[OWN] = layout.scatter(
            private.get(OWN, row), personal, key_map.unpack(mine, personal)
        )
    residual = memory.residual
    if RESIDUAL in content.array_records:
        residual = unpacked(from_arrays(content.array_records[RESIDUAL]))
    elif round_config.whole:
        residual = {}
    return ClientMemory(row, private, residual)
