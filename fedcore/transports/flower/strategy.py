"""FedLoRA: FedAvg's place in an app, any of our methods inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from pathlib import Path
from time import sleep
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.low_rank import packed
from fedcore.data.rows import Ranks, tensors_from_row
from fedcore.data.seeding import derive_seed
from fedcore.data.validation import Dropped, OnInvalid, digest, identical_rows
from fedcore.errors import FedcoreError
from fedcore.experiments.client_models import HELD
from fedcore.federation.state import ServerState, begin, save
from fedcore.methods import create_method
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore.transports.flower.messages import (
    BROADCAST,
    PERSONAL,
    RESIDUAL,
    TOLD,
    Order,
    Reply,
    Wire,
    from_arrays,
    to_arrays,
)
from fedcore_kernels.layout import FactorLayout


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


def wait_for_nodes(grid: Grid, wanted: int, poll: float = 1.0) -> list[int]:
    """All connected nodes in ascending order, once there are ``wanted`` of them."""
    while len(found := sorted(grid.get_node_ids())) < wanted:
        sleep(poll)
    return found


def sample_nodes(grid: Grid, fraction: float, least: int, available: int, seed: int) -> list[int]:
    """FedAvg's sample, ``max(int(fraction n), least)`` of n connected nodes, drawn by ``seed``."""
    wanted = max(int(len(list(grid.get_node_ids())) * fraction), least)
    nodes = wait_for_nodes(grid, max(available, wanted))
    generator = torch.Generator().manual_seed(derive_seed(seed, "sample"))
    chosen = torch.randperm(len(nodes), generator=generator)[:wanted]
    return sorted(nodes[i] for i in chosen.tolist())


PERSONAL_PREFIX, TOLD_PREFIX = "personal:", "told:"
"""How the server's state names what it keeps for a client: rows that it has not seen yet, and what
it told of its data."""


@dataclass(frozen=True)
class Download:
    """One client's message.

    Attributes:
        content: of the message.
        start: ``(P,)`` the shared row that the client starts from.
    """

    content: RecordDict
    start: Tensor


def start_row(state: ServerState, method: Method, client: str, ranks: Ranks | None) -> Tensor:
    """The global row ``(P,)``, or the method's approximation of it at the client's ``ranks``."""
    if ranks is None:
        return state.row
    held = state.private.get(client, {}).get(HELD, state.row)
    wanted = [ranks[module] for module in state.layout.modules]
    return method.for_client(
        Broadcast(state.layout, state.row), Broadcast(state.layout, held), wanted
    )


def download(
    state: ServerState,
    wire: Wire,
    method: Method,
    client: str,
    ranks: Ranks | None,
    *,
    config: ConfigRecord,
    arrays_key: str,
    config_key: str,
    whole: bool,
) -> Download:
    """The message's content for ``client``.

    Args:
        config: the user's; the order is added to a copy of it.
        whole: send everything; otherwise what changed since the client last took part.
    """
    layout, own = state.layout, state.private.get(client, {})
    row = start_row(state, method, client, ranks)
    known = client in state.client_versions
    held = own.get(HELD) if ranks is not None else None
    everything = whole or not known or (ranks is not None and held is None)
    if everything:
        part = layout
    elif held is not None:
        # What a client of lower rank receives may differ in other slots than those that changed.
        part = _differing(layout, row, held)
    else:
        part = state.stale_for(client)
    tensors = wire.pack(layout.gather(row, part), part, ranks)
    if whole or not known:
        tensors |= {wire.keys[name]: tensor for name, tensor in wire.constants.items()}
    told = any(name.startswith(TOLD_PREFIX) for name in own)
    plan = method.plan(state.round)
    order = Order(
        round=state.round,
        method=method.name,
        trains=",".join(sorted(plan.trains)),
        sends=",".join(sorted(plan.sends)),
        whole=everything,
        tell=method.wants_features and not told,
    )
    told_config = ConfigRecord(dict(config))
    order.write(told_config)
    content = RecordDict({arrays_key: to_arrays(tensors), config_key: told_config})
    personal = {
        name.removeprefix(PERSONAL_PREFIX): tensor
        for name, tensor in own.items()
        if name.startswith(PERSONAL_PREFIX)
    }
    if personal:
        content[PERSONAL] = to_arrays(personal)
    if state.residual and (everything or state.stale_residual(client)):
        content[RESIDUAL] = to_arrays(packed(state.residual))
    if method.uploads == "statistics" and ranks is not None:
        content[BROADCAST] = to_arrays(wire.pack(state.row, layout))
    return Download(content, row)


def _differing(layout: FactorLayout, row: Tensor, held: Tensor) -> FactorLayout:
    """The slots in which two rows differ."""
    return layout.part(
        s.name for s in layout if not torch.equal(layout.view(row, s), layout.view(held, s))
    )


class FedLoRA(FedAvg):
    """Federated averaging's place in a Flower app, with a method that knows what an adapter is.

    Clients receive an adapter's state dict by PEFT's keys and reply with what they trained of it;
    a reply may hold the frozen factors too, if they are unchanged. Everything is checked by name
    before it is aggregated: keys, shapes, ranks, finite values, weights. A node that dies or sends
    an error is left out of its round.

    Scalings are not looked at: clients of another rank set ``lora_alpha`` so that ``alpha / r`` is
    that of the server's adapter.

    Args:
        method: by name, or an instance with options of its own.
        on_invalid: ``"raise"`` ends the run at the first invalid upload, ``"drop"`` leaves it out.
        send: ``"all"`` sends the whole adapter every round, for clients that keep nothing;
            ``"changed"`` what is new since the client last took part.
        ranks: node id to the client's rank, where it is below that of the initial adapter.
        allow_identical_uploads: accept a round in which all uploads are the same bits.
        seed: of the draw of the nodes that take part.
        fedavg: FedAvg's own keyword arguments.

    Raises:
        FedcoreError: an unknown method, or one whose clients exchange nothing.
    """

    def __init__(
        self,
        method: str | Method,
        *,
        on_invalid: OnInvalid = "raise",
        send: str = "all",
        ranks: Mapping[int, int] | None = None,
        allow_identical_uploads: bool = False,
        seed: int = 0,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.method = create_method(method) if isinstance(method, str) else method
        if self.method.population != "clients":
            raise FedcoreError(f"{self.method.name} exchanges nothing, so a server has no part")
        if on_invalid not in ("raise", "drop"):
            raise FedcoreError(f"on_invalid is {on_invalid!r}; pass 'raise' or 'drop'")
        if send not in ("all", "changed"):
            raise FedcoreError(f"send is {send!r}; pass 'all' or 'changed'")
        self.on_invalid: OnInvalid = on_invalid
        self.send = send
        self.seed = seed
        self.allow_identical_uploads = allow_identical_uploads
        self._node_ranks = dict(ranks or {})
        self._state: ServerState | None = None
        self._wire: Wire | None = None
        self._folder: Path | None = None
        self._asked: dict[int, Asked] = {}

    @property
    def state(self) -> ServerState:
        """The state after the last completed round.

        Raises:
            FedcoreError: nothing was started yet.
        """
        if self._state is None:
            raise FedcoreError("the strategy has no state before start(...)")
        return self._state

    @property
    def wire(self) -> Wire:
        """Which key each tensor travels under.

        Raises:
            FedcoreError: nothing was started yet.
        """
        if self._wire is None:
            raise FedcoreError("the strategy knows no adapter before start(...)")
        return self._wire

    def summary(self) -> None:
        """Log the method and FedAvg's configuration."""
        log(INFO, "\t├──> Method: %s (%s)", self.method.name, self.method.summary)
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
    ) -> Result:
        """Run until ``num_rounds`` rounds are done, counting those of the run that is resumed.

        Args:
            initial_arrays: the adapter at the start, by PEFT's keys.
            checkpoint_dir: a state is written there before round 1 and after every round.
            resume: go on from the newest state in ``checkpoint_dir``, if there is one.

        Raises:
            FedcoreError: an adapter of another family than the method's, states that do not fit,
                or an invalid upload.
        """
        self._prepare(initial_arrays, checkpoint_dir, resume)
        done = self.state.round
        if done:
            # Whether the nodes still hold what they were sent before is not known.
            self._state = replace(self.state, client_versions={})
            log(INFO, "resuming: %s of %s rounds are done", done, num_rounds)
        arrays = self.arrays()

        def evaluate(server_round: int, found: ArrayRecord) -> MetricRecord | None:
            return evaluate_fn(server_round + done, found) if evaluate_fn else None

        result = super().start(
            grid,
            arrays,
            max(0, num_rounds - done),
            timeout,
            train_config,
            evaluate_config,
            evaluate if evaluate_fn else None,
        )
        if num_rounds <= done:
            result.arrays = arrays
        for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
            found = getattr(result, name)
            setattr(result, name, {number + done: value for number, value in found.items()})
        serverapp = result.evaluate_metrics_serverapp
        result.evaluate_metrics_serverapp = {n + done: value for n, value in serverapp.items()}
        return result

    def _prepare(
        self, initial: ArrayRecord, checkpoint_dir: str | Path | None, resume: bool
    ) -> None:
        wire, row = Wire.of(from_arrays(initial))
        if wire.family != self.method.family:
            raise FedcoreError(
                f"initial_arrays hold an adapter of family {wire.family!r}; {self.method.name} "
                f"needs {self.method.family!r}"
            )
        folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
        state = begin(folder, resume, ServerState(round=0, layout=wire.layout, row=row))
        self._wire, self._folder, self._state = wire, folder, state

    def _adopt(self, arrays: ArrayRecord) -> None:
        """Go on from ``arrays`` where a wrapper has changed what the last round returned, as those
        for differential privacy do.

        Raises:
            FedcoreError: noise on them means nothing for the method: it is no mean that changed, or
                not all of it was trained.
        """
        if self._state is None:
            self._prepare(arrays, None, False)
        state, wire = self.state, self.wire
        row = wire.unpack(from_arrays(arrays), state.layout)
        names = [
            slot.name
            for slot in state.layout
            if not torch.equal(state.layout.view(row, slot), state.layout.view(state.row, slot))
        ]
        if not names:
            return
        if not self.method.traits.linear:
            raise FedcoreError(
                f"a wrapper changed what {self.method.name} returned; its result is no mean of the "
                "uploads, so noise that fits a mean promises nothing: use a linear method"
            )
        frozen = self.method.frozen_layout(state.layout, max(state.round - 1, 0))
        held = sorted({*names} & {slot.name for slot in frozen})
        if held:
            raise FedcoreError(
                f"a wrapper changed {held[0]}, which {self.method.name} froze in the last round; "
                "wrappers need a method that trains every factor in every round"
            )
        versions = {**state.versions, **dict.fromkeys(names, state.round - 1)}
        self._state = replace(state, row=row, versions=versions)

    def arrays(self) -> ArrayRecord:
        """The global adapter, by the keys of the initial one; a residual is in ``state``."""
        tensors = self.wire.pack(self.state.row, self.state.layout)
        tensors |= {self.wire.keys[name]: value for name, value in self.wire.constants.items()}
        return to_arrays(tensors)

    def choose(self, grid: Grid) -> dict[int, str]:
        """The nodes of the coming round and their clients' names, by FedAvg's rules."""
        if self.fraction_train == 0.0:
            return {}
        nodes = sample_nodes(
            grid,
            self.fraction_train,
            self.min_train_nodes,
            self.min_available_nodes,
            self.seed + self.state.round,
        )
        return {node: f"node-{node}" for node in nodes}

    def ranks_of(self, node: int, client: str) -> Ranks | None:
        """Module to rank of a client whose ranks are its own."""
        rank = self._node_ranks.get(node)
        return None if rank is None else dict.fromkeys(self.state.layout.modules, rank)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a client: its order, and what it needs of the state."""
        self._adopt(arrays)
        self._asked, messages = {}, []
        for node, client in self.choose(grid).items():
            content = self._content(node, client, config, whole=self.send == "all", asks=True)
            messages.append(
                Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)
            )
        log(INFO, "configure_train: %s nodes", len(messages))
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As in training, but always the whole adapter; the order's round is the coming one."""
        if self.fraction_evaluate == 0.0:
            return []
        nodes = sample_nodes(
            grid,
            self.fraction_evaluate,
            self.min_evaluate_nodes,
            self.min_available_nodes,
            self.seed + self.state.round,
        )
        return [
            Message(
                content=self._content(node, f"node-{node}", config, whole=True, asks=False),
                message_type=MessageType.EVALUATE,
                dst_node_id=node,
            )
            for node in nodes
        ]

    def _content(
        self, node: int, client: str, config: ConfigRecord, *, whole: bool, asks: bool
    ) -> RecordDict:
        ranks = self.ranks_of(node, client)
        found = download(
            self.state,
            self.wire,
            self.method,
            client,
            ranks,
            config=config,
            arrays_key=self.arrayrecord_key,
            config_key=self.configrecord_key,
            whole=whole,
        )
        if asks:
            self._asked[node] = Asked(client, ranks, found.start)
        return found.content

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The method's server half on whatever of the round is valid; the state is saved.

        Raises:
            FedcoreError: an upload is invalid and ``on_invalid`` is ``"raise"``. The state stays
                that of the round before.
        """
        messages = list(replies)
        self._check_and_log_replies(messages, is_train=True, validate=False)
        state = self.state
        received = receive(
            state,
            self.wire,
            self.method,
            self._asked,
            messages,
            weight_key=self.weighted_by_key,
            on_invalid=self.on_invalid,
            allow_identical=self.allow_identical_uploads,
        )
        for drop in received.cohort.dropped:
            log(WARNING, "round %s: %s: %s", server_round, drop.client_id, drop.reason)
        result = self.method.aggregate(received.cohort, Broadcast(state.layout, state.row))
        for flag in (*received.flags, *result.flags):
            log(WARNING, "round %s: %s", server_round, flag)
        after = state.advanced(
            result.row,
            result.changed,
            received.reported,
            self._private(received, result),
            result.residual,
        )
        # A node that failed may have lost what it held: it gets everything the next time.
        silent = {who.client for who in self._asked.values()} - set(received.reported)
        versions = {c: v for c, v in after.client_versions.items() if c not in silent}
        after = replace(after, client_versions=versions)
        after = replace(after, record=self.record(after, received, result))
        self._state = self.keep(after)
        metrics = None
        if len(received.cohort):
            metrics = self.train_metrics_aggr_fn(
                [message.content for message in received.contents], self.weighted_by_key
            )
        return self.arrays(), metrics

    def _forget(self, client: str) -> None:
        """Send everything to ``client`` the next time."""
        versions = {c: v for c, v in self.state.client_versions.items() if c != client}
        self._state = replace(self.state, client_versions=versions)

    def record(self, after: ServerState, received: Received, result: Aggregate) -> dict[str, Any]:
        """What is written about a round, as JSON."""
        dropped = [{"client": d.client_id, "reason": d.reason} for d in received.cohort.dropped]
        found = {
            "round": after.round - 1,
            "sampled": sorted(who.client for who in self._asked.values()),
            "dropped": dropped,
            "flags": [*received.flags, *result.flags],
        }
        json.dumps(found, allow_nan=False)
        return found

    def keep(self, after: ServerState) -> ServerState:
        """Save the state of a completed round, atomically, and return it as it was saved."""
        save(after, self._folder)
        return after

    def _private(self, received: Received, result: Aggregate) -> dict[str, dict[str, Tensor]]:
        """What the server keeps for its clients: low-rank starts, rows of their own, statistics."""
        state = self.state
        found = {client: dict(named) for client, named in state.private.items()}
        for who in self._asked.values():
            if who.client not in received.reported:
                continue
            own = found.setdefault(who.client, {})
            # The client has merged these into its own values by now.
            for name in [n for n in own if n.startswith(PERSONAL_PREFIX)]:
                del own[name]
            if who.ranks is not None:
                own[HELD] = who.start
        for client, told in received.cohort.statistics.items():
            for name, tensor in told.items():
                found[client][TOLD_PREFIX + name] = tensor
        upload = self.method.upload_layout(state.layout, state.round)
        for client, row in result.personal.items():
            for key, tensor in self.wire.pack(row.to(state.row.dtype), upload).items():
                found.setdefault(client, {})[PERSONAL_PREFIX + key] = tensor
        return {client: named for client, named in found.items() if named}
