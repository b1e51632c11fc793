"""The client half: a message in, training by the recipe, a reply out."""

from __future__ import annotations

from dataclasses import replace

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedcore.data.low_rank import unpacked
from fedcore.engines.client_models import HELD, OWN, with_own
from fedcore.engines.client_turn import drops_out, take_turn
from fedcore.engines.flower.arrays import from_arrays, to_arrays
from fedcore.engines.flower.memory import Memory
from fedcore.engines.flower.orders import (
    BROADCAST,
    PERSONAL,
    RECORD,
    RESIDUAL,
    TOLD,
    Order,
    Reply,
)
from fedcore.engines.flower.wire import Wire
from fedcore.engines.observer import Observer
from fedcore.engines.private_clients import check_local
from fedcore.engines.workbench import Workbench
from fedcore.errors import FedcoreError
from fedcore.methods.base import Broadcast

ARRAYS, METRICS, EXAMPLES = "arrays", "metrics", "num-examples"

DROPPED_OUT = 4101
"""The code of the error by which a client says that it drops out of a round, as the recipe asks."""


def model_tensors(bench: Workbench) -> dict[str, Tensor]:
    """The model's adapter, constants and dense tensors, by PEFT's keys with the adapter's name."""
    bound = {id(parameter) for parameter in bench.binding.parameters.values()}
    fixed = {id(buffer) for buffer in bench.binding.constants.values()}
    found = {
        key: tensor.detach().cpu().clone()
        for key, tensor in bench.model.named_parameters()
        if id(tensor) in bound
    }
    return found | {
        key: buffer.detach().cpu().clone()
        for key, buffer in bench.model.named_buffers()
        if id(buffer) in fixed
    }


def introduce(message: Message, client: str) -> Message:
    """The answer to the server's question who this node is, and on how many threads."""
    reply = Reply(client, threads=torch.get_num_threads())
    return Message(RecordDict({RECORD: reply.record()}), reply_to=message)


def train(
    message: Message, context: Context, bench: Workbench, client: str, run: str = ""
) -> Message:
    """One client's round, to the local engine's bits (same machine, threads and versions).

    Args:
        message: as :class:`FedLoRA` sends it.
        context: of the node; what the client keeps is kept there.
        client: its id in the recipe.
        run: of which run the client's memory may be.

    Raises:
        FedcoreError: a message that does not fit the recipe, or one that holds a part of the
            adapter for a client that has lost the rest.
    """
    check_local(bench.recipe, "Flower")
    content = message.content
    order = Order.read(content)
    if order.method != bench.method.name:
        raise FedcoreError(
            f"the server runs {order.method}, this client's recipe says {bench.method.name}"
        )
    if drops_out(bench, order.round, client):
        reason = f"{client} drops out of round {order.round}"
        return Message(Error(code=DROPPED_OUT, reason=reason), reply_to=message)
    wire, _ = Wire.of(model_tensors(bench))
    memory = _updated(Memory.read(context.state, run), content, order, wire, bench, client)
    assert memory.row is not None
    layout, ranks = wire.layout, bench.ranks.get(client)
    broadcast = memory.row
    if BROADCAST in content.array_records:
        broadcast = wire.unpack(from_arrays(content.array_records[BROADCAST]), layout)
    bench.residual.load(memory.residual)
    turn = take_turn(
        bench,
        Broadcast(layout, broadcast),
        order.round,
        client,
        with_own(bench, layout, memory.row, memory.own, order.round),
        memory.own,
        Observer(),
    )
    # What a client of lower rank started from is the server's to remember.
    kept = {name: tensor for name, tensor in turn.kept.items() if name != HELD}
    replace(memory, own=kept or memory.own).write(context.state, run)
    sent = bench.method.upload_layout(layout, order.round)
    whole = bench.method.uploads == "statistics"
    tensors = wire.pack(turn.upload, sent, None if whole else ranks)
    if bench.recipe.round.codec == "bf16":
        # They are rounded already, so this changes their size alone.
        tensors = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    metrics = {EXAMPLES: turn.weight, "train-loss": turn.loss}
    if turn.accuracy is not None:
        metrics["local-accuracy"] = turn.accuracy
    if turn.held_out_loss is not None:
        metrics["local-loss"] = turn.held_out_loss
    answer = RecordDict(
        {
            ARRAYS: to_arrays(tensors),
            METRICS: MetricRecord(dict(metrics)),
            RECORD: Reply(client, order.round, turn.frozen, turn.flags).record(),
        }
    )
    if order.tell and client in bench.statistics:
        answer[TOLD] = to_arrays(bench.statistics[client])
    return Message(answer, reply_to=message)


def _updated(
    memory: Memory, content: RecordDict, order: Order, wire: Wire, bench: Workbench, client: str
) -> Memory:
    """The memory with what the message brings."""
    arrays = {
        name: from_arrays(record)
        for name, record in content.array_records.items()
        if name not in (PERSONAL, RESIDUAL, BROADCAST)
    }
    if len(arrays) != 1:
        raise FedcoreError(f"the message has {len(arrays)} array records; one is needed")
    tensors = next(iter(arrays.values()))
    part = wire.part_of(tensors)
    if memory.row is None and not order.whole:
        raise FedcoreError(f"{client} holds nothing of this run and was sent a part of it")
    news = wire.unpack(tensors, part, bench.ranks.get(client))
    layout = wire.layout
    row = torch.zeros(layout.size) if order.whole or memory.row is None else memory.row
    row = layout.scatter(row, part, news)
    own = dict(memory.own)
    if PERSONAL in content.array_records:
        mine = from_arrays(content.array_records[PERSONAL])
        personal = wire.part_of(mine)
        own[OWN] = layout.scatter(own.get(OWN, row), personal, wire.unpack(mine, personal))
    residual = memory.residual
    if RESIDUAL in content.array_records:
        residual = unpacked(from_arrays(content.array_records[RESIDUAL]))
    elif order.whole:
        residual = {}
    return Memory(row, own, residual)
