"""The replies of a round as a cohort: checked, and refused by the client's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.keyed_rows import Ranks, tensors_from_row
from fedcore.data.server_state import ServerState
from fedcore.data.validation import Dropped, OnInvalid, digest, identical_rows
from fedcore.engines.flower.arrays import from_arrays
from fedcore.engines.flower.downloads import TOLD_PREFIX
from fedcore.engines.flower.orders import TOLD, Reply
from fedcore.engines.flower.wire import Wire
from fedcore.errors import FedcoreError
from fedcore.methods.base import Method


@dataclass(frozen=True)
class Asked:
    """A client that a round was sent to: its node, ranks of its own if any, and its start row."""

    client: str
    ranks: Ranks | None
    start: Tensor


@dataclass(frozen=True)
class Received:
    """What a round brought.

    Attributes:
        cohort: the valid uploads; its ``dropped`` tells of all others.
        contents: the replies of the cohort's clients, in its order.
        reported: every client that replied, with whatever.
        flags: those of the uploads, each with its client's name.
    """

    cohort: Cohort
    contents: tuple[Message, ...]
    reported: tuple[str, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class _Upload:
    row: Tensor
    weight: float
    reply: Reply
    told: Mapping[str, Tensor]


def receive(
    state: ServerState,
    wire: Wire,
    method: Method,
    asked: Mapping[int, Asked],
    replies: Sequence[Message],
    *,
    weight_key: str,
    on_invalid: OnInvalid,
    allow_identical: bool,
) -> Received:
    """Read, check and gather ``replies``; nodes that sent an error, or nothing, are left out.

    Raises:
        FedcoreError: an upload is invalid and ``on_invalid`` is ``"raise"``, or all uploads are the
            same bits and the method needs them to differ.
    """
    layout, t = state.layout, state.round
    sent, frozen = method.upload_layout(layout, t), method.frozen_layout(layout, t)
    builder = CohortBuilder(sent, [who.client for who in asked.values()], round=t)
    constants = [wire.constants[name] for name in sorted(wire.constants)]
    contents: dict[str, Message] = {}
    flags: list[str] = []
    statistics: dict[str, dict[str, Tensor]] = {}
    failed: dict[str, str] = {}
    reported = []
    for message in replies:
        who = asked.get(message.metadata.src_node_id)
        if who is None:
            continue
        if message.has_error():
            failed[who.client] = f"its node sent an error: {message.error.reason}"
            continue
        reported.append(who.client)
        whole = method.uploads == "statistics"
        try:
            found = _read(message, wire, state, method, who, weight_key)
        except FedcoreError as error:
            builder.refuse(who.client, str(error))
            continue
        builder.row(who.client).copy_(found.row)
        flags += [f"{who.client}: {flag}" for flag in found.reply.flags]
        held = digest(layout.gather(who.start, frozen), frozen, constants)
        builder.receive(
            who.client,
            found.weight,
            round=found.reply.round if found.reply.round >= 0 else None,
            frozen=found.reply.frozen or None,
            expected_frozen=held if found.reply.frozen else None,
            ranks=None if whole else who.ranks,
        )
        contents[who.client] = message
        kept = state.private.get(who.client, {})
        earlier = {n: v for n, v in kept.items() if n.startswith(TOLD_PREFIX)}
        told = {n.removeprefix(TOLD_PREFIX): v for n, v in earlier.items()} | dict(found.told)
        if told:
            statistics[who.client] = told
    cohort = builder.finish(on_invalid)
    if not method.traits.linear and not allow_identical and identical_rows(cohort.updates):
        raise FedcoreError(
            f"round {t}: all {len(cohort)} uploads are the same bits, which {method.name} cannot "
            "aggregate usefully; clients did not train, or a sum-only aggregator replaced their "
            "uploads (allow_identical_uploads=True accepts it)"
        )
    dropped = [Dropped(d.client_id, failed.get(d.client_id, d.reason)) for d in cohort.dropped]
    told_by = {client: statistics[client] for client in cohort.client_ids if client in statistics}
    return Received(
        cohort=replace(cohort, dropped=tuple(dropped), statistics=told_by),
        contents=tuple(contents[client] for client in cohort.client_ids),
        reported=tuple(reported),
        flags=tuple(flags),
    )


def _read(
    message: Message, wire: Wire, state: ServerState, method: Method, who: Asked, weight_key: str
) -> _Upload:
    """One reply's upload.

    Raises:
        FedcoreError: what is wrong with it; its values are not looked at.
    """
    content, layout = message.content, state.layout
    reply = Reply.read(content)
    if reply.client and reply.client != who.client:
        raise FedcoreError(f"its reply is from {reply.client!r}")
    records = {name: r for name, r in content.array_records.items() if name != TOLD}
    if len(records) != 1:
        raise FedcoreError(f"its reply has {len(records)} array records; one is needed")
    # A factor that nobody trains may come along as it was, as PEFT's state dicts have it.
    frozen = method.frozen_layout(layout, state.round)
    held = tensors_from_row(layout.gather(who.start, frozen), frozen, who.ranks)
    ranks = None if method.uploads == "statistics" else who.ranks
    sent = method.upload_layout(layout, state.round)
    row = wire.unpack(from_arrays(next(iter(records.values()))), sent, ranks, held)
    told = content.array_records.get(TOLD)
    return _Upload(
        row, _weight(content, weight_key), reply, from_arrays(told) if told is not None else {}
    )


def _weight(content: RecordDict, key: str) -> float:
    for metrics in content.metric_records.values():
        if key in metrics:
            weight = metrics[key]
            if isinstance(weight, int | float):
                return float(weight)
            raise FedcoreError(f"its {key} is {weight!r}; pass one number")
    raise FedcoreError(f"its reply does not say {key}")
