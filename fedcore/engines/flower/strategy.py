"""FedLoRA: FedAvg's place in an app, any of our methods inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from fedcore.data.keyed_rows import Ranks
from fedcore.data.server_state import ServerState
from fedcore.data.validation import OnInvalid
from fedcore.engines.client_models import HELD
from fedcore.engines.flower.arrays import from_arrays, to_arrays
from fedcore.engines.flower.checkpoints import begin, save
from fedcore.engines.flower.downloads import (
    PERSONAL_PREFIX,
    TOLD_PREFIX,
    download,
)
from fedcore.engines.flower.nodes import sample_nodes
from fedcore.engines.flower.uploads import Asked, Received, receive
from fedcore.engines.flower.wire import Wire
from fedcore.errors import FedcoreError
from fedcore.methods import Method, create_method
from fedcore.methods.base import Aggregate, Broadcast


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
