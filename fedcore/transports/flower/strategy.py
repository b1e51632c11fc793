"""FedLoRA: FedAvg's place in an app, any of our methods inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from time import sleep
from typing import Any, get_args

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from fedcore.checks import choice
from fedcore.data.adapter_state import AdapterState
from fedcore.data.announcement import Announcement
from fedcore.data.base_identity import BaseIdentity
from fedcore.data.claims import claimed
from fedcore.data.rows import Ranks, tensors_from_row
from fedcore.data.seeding import derive_seed
from fedcore.data.validation import (
    Dropped,
    OnInvalid,
    Weighting,
    digest,
    enforce,
    refuse_ranks,
)
from fedcore.errors import FedcoreError
from fedcore.federation.acceptance import MAX_GROWTH, Limits
from fedcore.federation.announcements import with_agreed
from fedcore.federation.checkpoints import begin, save
from fedcore.federation.downloads import download
from fedcore.federation.server_round import ClosedRound, OpenRound
from fedcore.federation.state import ServerState
from fedcore.methods import create_method
from fedcore.methods.base import Method
from fedcore.methods.requirements import EXCHANGES, check_start, refuse
from fedcore.transports.flower.announcer import Announcer
from fedcore.transports.flower.messages import (
    KeyMap,
    ReplyInfo,
    broadcast_content,
    from_arrays,
    read_reply,
    to_arrays,
)
from fedcore.transports.flower.reply_metrics import (
    aggregated,
    log_replies,
    read_evaluations,
    with_metrics,
)
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class Asked:
    """A client that a round was sent to: its node, ranks of its own if any, and its start row."""

    client: str
    ranks: Ranks | None
    start: Tensor


def wait_for_nodes(grid: Grid, wanted: int, poll: float = 1.0) -> list[int]:
    """All connected nodes in ascending order, once there are ``wanted`` of them."""
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        sleep(poll)
    return nodes


def sample_nodes(grid: Grid, fraction: float, least: int, available: int, seed: int) -> list[int]:
    """FedAvg's sample, ``max(int(fraction n), least)`` of n connected nodes, drawn by ``seed``."""
    wanted = max(int(len(list(grid.get_node_ids())) * fraction), least)
    nodes = wait_for_nodes(grid, max(available, wanted))
    generator = torch.Generator().manual_seed(derive_seed(seed, "sample"))
    chosen = torch.randperm(len(nodes), generator=generator)[:wanted]
    return sorted(nodes[i] for i in chosen.tolist())


class FedLoRA(FedAvg):
    """Federated averaging's place in a Flower app, with a method that knows what an adapter is.

    Clients receive an adapter's state dict by PEFT's keys and reply with what they trained of it;
    a reply may hold the frozen factors too, if they are unchanged. Everything is checked by name
    before it is aggregated: keys, shapes, ranks, finite values, weights. A node that dies or sends
    an error is left out of its round.

    Replies that repeat what their message announced (:func:`repeat`; the clients of a recipe do)
    are compared with it: round, broadcast, scalings, kind of adapter, base model. What the server
    was not given is compared between the clients. Of clients that say nothing, none of this is
    known: set ``lora_alpha`` so that ``alpha / r`` is that of the server's adapter, also for
    another rank.

    Args:
        method: by name, or an instance with options of its own.
        on_invalid: ``"raise"`` ends the run at the first invalid upload, ``"drop"`` leaves it out.
        send: ``"all"`` sends the whole adapter every round, for clients that keep nothing;
            ``"changed"`` what is new since the client last took part.
        ranks: node id to the client's rank, where it is below that of the initial adapter.
        adapter_config: of the initial adapter, ``adapter_config.json`` as a mapping, or the folder
            that holds it.
        base: the base model that every client has to hold; by default what ``base.json`` beside
            ``adapter_config`` says.
        allow: parts of the base that may differ, each flagged in the record of every round.
        plain_clients: accept replies that repeat nothing, of clients that never did.
        allow_identical_uploads: accept a round in which all uploads are identical.
        weighting: by the examples that clients report, or all alike.
        max_growth: how many times as large as state and uploads a result may be; a larger one
            leaves the state as it is, with a flag in ``state.record``.
        largest_share: of the total weight, that one client may have; None sets no bound.
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
        weighting: Weighting = "examples",
        max_growth: float = MAX_GROWTH,
        largest_share: float | None = None,
        adapter_config: Mapping[str, Any] | str | Path | None = None,
        base: BaseIdentity | None = None,
        allow: Iterable[str] = (),
        plain_clients: bool = True,
        seed: int = 0,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.method = create_method(method) if isinstance(method, str) else method
        refuse(self.method, (EXCHANGES,), "FedLoRA")
        if on_invalid not in ("raise", "drop"):
            raise FedcoreError(f"on_invalid is {on_invalid!r}; pass 'raise' or 'drop'")
        if send not in ("all", "changed"):
            raise FedcoreError(f"send is {send!r}; pass 'all' or 'changed'")
        self.on_invalid: OnInvalid = on_invalid
        self.send = send
        self.seed = seed
        self.allow_identical_uploads = allow_identical_uploads
        choice("FedLoRA", "weighting", weighting, get_args(Weighting))
        self.weighting: Weighting = weighting
        self._limits = Limits(max_growth, largest_share)
        self.plain_clients = plain_clients
        self._announcer = Announcer(adapter_config, base, allow)
        self._node_ranks = dict(ranks or {})
        self._state: ServerState | None = None
        self._key_map: KeyMap | None = None
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
    def key_map(self) -> KeyMap:
        """Which key each tensor travels under.

        Raises:
            FedcoreError: nothing was started yet.
        """
        if self._key_map is None:
            raise FedcoreError("the strategy knows no adapter before start(...)")
        return self._key_map

    @property
    def announcement(self) -> Announcement:
        """What the server knows of the coming round, which replies have to repeat."""
        return self._announcer.announce(self.state, self.key_map.constants)

    def summary(self) -> None:
        """Log the method and FedAvg's configuration."""
        log(INFO, "\t├──> Method: %s (%s)", self.method.name, self.method.description.summary)
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
            resume: continue from the newest state in ``checkpoint_dir``, if there is one.

        Raises:
            FedcoreError: an adapter of another family than the method's, states that do not fit or
                are damaged, a folder of states that is in use, or an invalid upload.
        """
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        with claimed(folder):
            self._announcer.total_rounds = num_rounds if num_rounds > 0 else None
            self._prepare(initial_arrays, folder, resume)
            done = self.state.round
            if done:
                # Whether the nodes still hold what they were sent before is not known.
                self._state = replace(self.state, client_versions={})
                log(INFO, "resuming: %s of %s rounds are done", done, num_rounds)
            arrays = self.arrays()

            def evaluate(server_round: int, current: ArrayRecord) -> MetricRecord | None:
                return evaluate_fn(server_round + done, current) if evaluate_fn else None

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
                metrics = getattr(result, name)
                setattr(result, name, {number + done: value for number, value in metrics.items()})
            serverapp = result.evaluate_metrics_serverapp
            result.evaluate_metrics_serverapp = {n + done: value for n, value in serverapp.items()}
            return result

    def _prepare(self, initial: ArrayRecord, folder: Path | None, resume: bool) -> None:
        tensors = from_arrays(initial)
        key_map, row = KeyMap.of(tensors)
        check_start(self.method, key_map.family, key_map.keys.values(), "initial_arrays")
        refuse_ranks(AdapterState.from_tensors(tensors), "initial_arrays")
        self._announcer.fit(key_map.layout)
        state = begin(folder, resume, ServerState(round=0, layout=key_map.layout, row=row))
        self._key_map, self._folder, self._state = key_map, folder, state

    def _adopt(self, arrays: ArrayRecord) -> None:
        """Continue from ``arrays`` where a wrapper has changed what the last round returned, as
        those for differential privacy do.

        Raises:
            FedcoreError: noise on them means nothing for the method: what changed is not a mean, or
                not all of it was trained.
        """
        if self._state is None:
            self._prepare(arrays, None, False)
        state, key_map = self.state, self.key_map
        row = key_map.unpack(from_arrays(arrays), state.layout)
        names = [
            slot.name
            for slot in state.layout
            if not torch.equal(state.layout.view(row, slot), state.layout.view(state.row, slot))
        ]
        if not names:
            return
        if not self.method.capabilities.linear:
            raise FedcoreError(
                f"a wrapper changed what {self.method.name} returned; its result is not a mean of "
                "the uploads, so noise that fits a mean promises nothing; use a linear method"
            )
        frozen = self.method.frozen_layout(state.layout, max(state.round - 1, 0))
        changed = sorted({*names} & {slot.name for slot in frozen})
        if changed:
            raise FedcoreError(
                f"a wrapper changed {changed[0]}, which {self.method.name} froze in the last "
                "round; use a method that trains every factor in every round, or no wrapper"
            )
        versions = {**state.versions, **dict.fromkeys(names, state.round - 1)}
        self._state = replace(state, row=row, versions=versions)

    def arrays(self) -> ArrayRecord:
        """The global adapter, by the keys of the initial one; a residual is in ``state``."""
        tensors = self.key_map.pack(self.state.row, self.state.layout)
        tensors |= {
            self.key_map.keys[name]: value for name, value in self.key_map.constants.items()
        }
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
        """One message per client: the round's configuration, and what it needs of the state."""
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
        """As in training, but always the whole adapter; the round is the coming one."""
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
        downloaded = download(self.state, self.method, client, ranks, everything=whole)
        if asks:
            self._asked[node] = Asked(client, ranks, downloaded.start)
        return broadcast_content(
            self.state,
            self.method,
            self.key_map,
            client,
            ranks,
            downloaded,
            with_agreed(self.announcement, self.state).brief,
            config=config,
            arrays_key=self.arrayrecord_key,
            config_key=self.configrecord_key,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The method's server half on whatever of the round is valid; the state is saved.

        Raises:
            FedcoreError: an upload is invalid and ``on_invalid`` is ``"raise"``. The state stays
                that of the round before.
        """
        messages = list(replies)
        log_replies("aggregate_train", messages)
        opened, contents = self._received(messages)
        closed = opened.close(name_personal=partial(self._pack_upload, opened.layout))
        for drop in closed.cohort.dropped:
            log(WARNING, "round %s: %s: %s", server_round, drop.client_id, drop.reason)
        for flag in closed.flags:
            log(WARNING, "round %s: %s", server_round, flag)
        cohort = closed.cohort
        valid = {client: contents[client] for client in cohort.client_ids}
        self._state = self.keep(replace(closed.state, record=self.record(closed, valid)))
        weights = dict(zip(cohort.client_ids, cohort.weights.tolist(), strict=True))
        metrics = aggregated(self.train_metrics_aggr_fn, valid, weights, self.weighted_by_key)
        return self.arrays(), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The mean of what the nodes report of an evaluation.

        Raises:
            FedcoreError: a reply is invalid and ``on_invalid`` is ``"raise"``.
        """
        messages = list(replies)
        log_replies("aggregate_evaluate", messages)
        contents, weights, problems = read_evaluations(messages, self.weighted_by_key)
        bad = [Dropped(node, reason) for node, reason in sorted(problems.items())]
        enforce(bad, self.on_invalid, server_round - 1)
        for drop in bad:
            log(WARNING, "round %s: %s: %s", server_round, drop.client_id, drop.reason)
        return aggregated(self.evaluate_metrics_aggr_fn, contents, weights, self.weighted_by_key)

    def weight_of(self, client: str, reported: float) -> float:
        """The weight of an upload whose client reports ``reported`` examples.

        Raises:
            FedcoreError: that cannot be true.
        """
        return reported

    def _received(self, replies: Iterable[Message]) -> tuple[OpenRound, dict[str, RecordDict]]:
        """The round with all that came back, and the clients' replies by name."""
        asked = self._asked
        opened = OpenRound(
            self.method,
            self.state,
            [who.client for who in asked.values()],
            on_invalid=self.on_invalid,
            allow_identical_uploads=self.allow_identical_uploads,
            limits=self._limits,
            starts={who.client: who.start for who in asked.values() if who.ranks is not None},
            announced=self.announcement,
            plain_clients=self.plain_clients,
        )
        constants = [self.key_map.constants[name] for name in sorted(self.key_map.constants)]
        layout, frozen = self.state.layout, opened.frozen
        by_examples = self.weighting == "examples"
        contents: dict[str, RecordDict] = {}
        for message in replies:
            who = asked.get(message.metadata.src_node_id)
            if who is None:
                continue
            if message.has_error():
                reason = f"its node sent an error: {message.error.reason}"
                opened.unreachable(who.client, reason)
                continue
            # A factor that nobody trains may come along as it was, as PEFT's state dicts have it.
            unchanged = tensors_from_row(layout.gather(who.start, frozen), frozen, who.ranks)
            ranks = None if self.method.capabilities.uploads == "statistics" else who.ranks
            try:
                opened.check_repeats(who.client, ReplyInfo.read(message.content).said)
                upload = read_reply(
                    message.content,
                    self.key_map,
                    opened.layout,
                    who.client,
                    ranks,
                    unchanged=unchanged,
                    weight_key=self.weighted_by_key if by_examples else None,
                )
                reply = upload.reply
                expected = digest(layout.gather(who.start, frozen), frozen, constants)
                opened.receive(
                    who.client,
                    upload.row,
                    self.weight_of(who.client, upload.weight) if by_examples else 1.0,
                    round=reply.round if reply.round >= 0 else None,
                    frozen=reply.frozen or None,
                    expected_frozen=expected if reply.frozen else None,
                    ranks=ranks,
                    flags=reply.flags,
                    statistics=upload.statistics,
                )
                contents[who.client] = with_metrics(message.content, upload.metrics)
            except FedcoreError as error:
                opened.refuse(who.client, str(error))
            except Exception as error:
                # Whatever a reply does to the code that reads it is the fault of that reply.
                opened.refuse(who.client, f"its reply cannot be read ({type(error).__name__})")
        return opened, contents

    def _pack_upload(self, layout: FactorLayout, row: Tensor) -> dict[str, Tensor]:
        return self.key_map.pack(row.to(self.state.row.dtype), layout)

    def _forget(self, client: str) -> None:
        """Send everything to ``client`` the next time."""
        versions = {c: v for c, v in self.state.client_versions.items() if c != client}
        self._state = replace(self.state, client_versions=versions)

    def record(self, closed: ClosedRound, replies: Mapping[str, RecordDict]) -> dict[str, Any]:
        """What is written about a round, as JSON.

        Args:
            replies: those of the cohort's clients, by name.
        """
        sampled = sorted(who.client for who in self._asked.values())
        return {"sampled": sampled, **closed.record}

    def keep(self, after: ServerState) -> ServerState:
        """Save the state of a completed round, atomically, and return it as it was saved."""
        save(after, self._folder)
        return after
