"""The server half of a federation behind every transport, one round at a time and by one interface.

A *federation* is opened from an adapter and a method, is given what the clients of a round send,
and says what the server has made of it: as bytes that clients could read, where its transport has
any. Nothing is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.announcement import Announcement
from fedcore.data.cohort import Cohort
from fedcore.data.exchange import UploadFolder, read_broadcast, write_upload
from fedcore.data.low_rank import LowRank, accumulated
from fedcore.data.peft_files import WEIGHTS_FILE, write_adapter
from fedcore.data.rows import Ranks, row_from_tensors, tensors_from_row
from fedcore.data.validation import OnInvalid, digest
from fedcore.federation.downloads import lower_rank_starts
from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import ServerState, personal_of
from fedcore.methods import Broadcast, Method
from fedcore.methods.registry import options_of
from fedcore.transports.flower import FedLoRA, from_arrays, to_arrays
from fedcore.transports.flower.messages import ReplyInfo, RoundConfig
from fedcore.transports.folders import FileServer
from fedcore_kernels import FactorLayout
from tests.property.method_rounds import family_layout, random_row
from tests.transports.flower.grid import FakeGrid
from tests.transports.nvflare_stand_in import install

install()

from nvflare.app_common.abstract.fl_model import FLModel  # noqa: E402

from fedcore.transports.nvflare import (  # noqa: E402
    ANNOUNCED,
    NUM_STEPS,
    AdapterPersistor,
    FedLoRAAggregator,
)

RANK = 3

_SUFFIX = {"lora": ".weight", "gram": "", "tri": ""}


@dataclass(frozen=True)
class Sent:
    """What one client sends in a round.

    Attributes:
        client: ``node-1``, ``node-2``, ...: the names that Flower gives them.
        row: ``(P,)`` in the upload layout of the round.
        weight: as the client reports it.
        ranks: module to rank, where the client's are its own.
        statistics: of its data, sent once.
        round: the round that it says it trained for; the server's where it is None.
        tensors: slot name to tensor in place of that of the row, None for one that is left out.
        says: what it repeats of what the round's broadcast announced; by default what its transport
            has to say of itself, and no more.
    """

    client: str
    row: Tensor
    weight: float
    ranks: Ranks | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    round: int | None = None
    tensors: Mapping[str, Tensor | None] = field(default_factory=dict)
    says: Callable[[Announcement], Announcement] | None = None

    def named(self, layout: FactorLayout) -> dict[str, Tensor]:
        """What travels, by slot name."""
        named = {**tensors_from_row(self.row, layout, self.ranks), **self.tensors}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Outcome:
    """What a round left behind.

    Attributes:
        row: ``(P,)`` the next global row, as clients receive it.
        residual: the low-rank update of the base weights so far.
        personal: client to the row ``(P,)`` of its own, in the round's upload layout.
        weights: client to weight, of those that counted.
        dropped: the clients that were left out.
        flags: in the round's record.
    """

    row: Tensor
    residual: Mapping[str, LowRank]
    personal: Mapping[str, Tensor]
    weights: Mapping[str, float]
    dropped: tuple[str, ...]
    flags: tuple[str, ...]


class Federation(ABC):
    """A method's server behind one transport.

    Args:
        folder: an empty one, for whatever the transport writes.
        on_invalid, allow_identical_uploads: as everywhere.
        ranks: client to its rank, where it is below that of ``start``.
    """

    def __init__(
        self,
        method: Method,
        start: AdapterState,
        folder: Path,
        *,
        on_invalid: OnInvalid = "raise",
        allow_identical_uploads: bool = False,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.method, self.start, self.folder = method, start, folder
        self.on_invalid: OnInvalid = on_invalid
        self.allow_identical_uploads = allow_identical_uploads
        self.ranks = {
            client: dict.fromkeys(start.layout().modules, rank)
            for client, rank in (ranks or {}).items()
        }
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Start the server; raises its refusal of the method."""

    @property
    @abstractmethod
    def state(self) -> ServerState:
        """After the last round."""

    @abstractmethod
    def play(self, uploads: Sequence[Sent]) -> Outcome:
        """One round of clients that send ``uploads``, which arrive in this order."""

    def announced(self) -> Announcement:
        """What the clients of the coming round read in the message that reaches them."""
        raise NotImplementedError(f"{type(self).__name__} carries no message")

    @property
    def previous(self) -> Broadcast:
        """What the clients of the coming round start from."""
        return Broadcast(self.state.layout, self.state.row)

    @property
    def upload_layout(self) -> FactorLayout:
        """Of the coming round."""
        return self.method.upload_layout(self.state.layout, self.state.round)

    def _outcome(self, row: Tensor, personal: Mapping[str, Tensor]) -> Outcome:
        """The outcome that the state's record tells of, with the row that clients receive."""
        record = self.state.record
        return Outcome(
            row,
            self.state.residual,
            personal,
            record["clients"],
            tuple(drop["client"] for drop in record["dropped"]),
            tuple(record["flags"]),
        )


class Direct(Federation):
    """No transport: the method's server half on a cohort that is put together by hand."""

    first_round = 0

    def open(self) -> None:
        layout = self.start.layout()
        row = self.start.to_row(layout)
        self._state = ServerState(round=self.first_round, layout=layout, row=row)
        self._statistics: dict[str, Mapping[str, Tensor]] = {}

    @property
    def state(self) -> ServerState:
        return self._state

    def cohort(self, uploads: Sequence[Sent]) -> Cohort:
        """The clients of positive weight in order of their names."""
        layout, dtype = self.upload_layout, self.state.row.dtype
        valid = sorted((s for s in uploads if s.weight > 0), key=lambda sent: sent.client)
        rows = [sent.row for sent in valid]
        full = {slot.module: slot.rows for slot in layout.factor_slots}
        ranks = [[(sent.ranks or full)[module] for module in layout.modules] for sent in valid]
        shape = len(valid), len(layout.modules)
        return Cohort(
            layout=layout,
            updates=torch.stack(rows) if rows else torch.zeros(0, layout.size, dtype=dtype),
            weights=torch.tensor([sent.weight for sent in valid], dtype=torch.float64),
            client_ids=tuple(sent.client for sent in valid),
            round=self.state.round,
            ranks=torch.tensor(ranks, dtype=torch.int64).reshape(shape),
            scalings=torch.ones(shape, dtype=torch.float64),
            statistics={
                sent.client: self._statistics[sent.client]
                for sent in valid
                if sent.client in self._statistics
            },
        )

    def play(self, uploads: Sequence[Sent]) -> Outcome:
        self._statistics |= {sent.client: sent.statistics for sent in uploads if sent.statistics}
        cohort, state = self.cohort(uploads), self._state
        result = self.method.aggregate(cohort, self.previous)
        left_out = sorted({sent.client for sent in uploads} - set(cohort.client_ids))
        self._state = replace(
            state,
            round=state.round + 1,
            row=result.row,
            residual=accumulated(state.residual, result.residual),
            record={
                "clients": dict(zip(cohort.client_ids, cohort.weights.tolist(), strict=True)),
                "dropped": [{"client": client} for client in left_out],
                "flags": result.flags,
            },
        )
        return self._outcome(result.row, result.personal)


class DirectFromRoundOne(Direct):
    """The same from round 1 on, for methods that treat odd rounds otherwise."""

    first_round = 1


class Local(Federation):
    """The server's round as the engine of one process uses it."""

    def open(self) -> None:
        layout = self.start.layout()
        self._state = ServerState(round=0, layout=layout, row=self.start.to_row(layout))

    @property
    def state(self) -> ServerState:
        return self._state

    def play(self, uploads: Sequence[Sent]) -> Outcome:
        clients = [sent.client for sent in uploads]
        opened = OpenRound(
            self.method,
            self._state,
            clients,
            on_invalid=self.on_invalid,
            allow_identical_uploads=self.allow_identical_uploads,
            starts=lower_rank_starts(self._state, self.method, clients, self.ranks),
        )
        frozen = self._state.layout.gather(self._state.row, opened.frozen)
        unchanged = digest(frozen, opened.frozen)
        for sent in uploads:
            opened.receive(
                sent.client,
                sent.row,
                sent.weight,
                round=sent.round,
                frozen=unchanged,
                expected_frozen=unchanged,
                ranks=sent.ranks,
                statistics=sent.statistics,
            )
        closed = opened.close()
        self._state = closed.state
        return self._outcome(closed.state.row, closed.result.personal)


class Folders(Federation):
    """Folders that are written and read."""

    def open(self) -> None:
        options = options_of(self.method)
        self._server = FileServer.create(
            self.folder / "federation", self.start, self.method.name, **options
        )

    @property
    def state(self) -> ServerState:
        return self._server.state

    def announced(self) -> Announcement:
        return read_broadcast(self._server.broadcast).announcement

    def play(self, uploads: Sequence[Sent]) -> Outcome:
        server, layout, t = self._server, self.upload_layout, self.state.round
        received = read_broadcast(server.broadcast)
        announced = self.announced()
        frozen = self.method.frozen_layout(received.layout, t)
        factors = self.method.capabilities.uploads == "factors"
        folders = {}
        for sent in uploads:
            folders[sent.client] = write_upload(
                UploadFolder(
                    sent.row,
                    t if sent.round is None else sent.round,
                    sent.weight,
                    received.digest_of(frozen),
                    received.identity,
                ),
                layout,
                received.adapter,
                self.folder / f"uploads-{t}" / sent.client,
                factors=factors,
            )
            if sent.says is not None:
                said = sent.says(announced)
                upload = UploadFolder.of(
                    said, sent.row, sent.weight, received.digest_of(frozen), ()
                )
                config = {**received.adapter.config, **_declaring(said, announced)}
                adapter = replace(received.adapter, config=config)
                write_upload(upload, layout, adapter, folders[sent.client], factors=factors)
            if sent.tensors or sent.ranks:
                _rewrite(folders[sent.client], sent.named(layout), received.adapter, factors)
        self._server = server.round(
            folders,
            on_invalid=self.on_invalid,
            allow_identical_uploads=self.allow_identical_uploads,
        )
        after = read_broadcast(self._server.broadcast)
        assert after.residual.keys() == self.state.residual.keys()
        return self._outcome(after.row, {})


def _declaring(said: Announcement, announced: Announcement) -> dict[str, Any]:
    """The fields of a configuration that declares what ``said`` says."""
    fields = dict(said.kind)
    if said.scaling != announced.scaling:
        (scaling,) = set(said.scaling.values())
        fields["lora_alpha"] = scaling * RANK
    return fields


def _rewrite(
    folder: Path, named: Mapping[str, Tensor], adapter: AdapterState, factors: bool
) -> None:
    """Put ``named`` in place of the tensors of the upload in ``folder``."""
    file = folder / WEIGHTS_FILE
    if not factors:
        (file,) = folder.glob("*.safetensors")
    keys = {name: adapter.keys[name] if factors else name for name in named}
    assert set(load_file(file)) >= {keys[name] for name in named}
    save_file({keys[name]: tensor.contiguous() for name, tensor in named.items()}, file)


class Flower(Federation):
    """Messages of Flower, through a grid in this process."""

    knows_adapter = False

    def open(self) -> None:
        self._strategy = FedLoRA(
            self.method,
            on_invalid=self.on_invalid,
            allow_identical_uploads=self.allow_identical_uploads,
            ranks={_node(client): min(ranks.values()) for client, ranks in self.ranks.items()},
            adapter_config=self.start.config if self.knows_adapter else None,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=1,
        )
        self._arrays = to_arrays(self.start.to_peft())
        self._strategy.start(FakeGrid({}), self._arrays, num_rounds=0)

    @property
    def state(self) -> ServerState:
        return self._strategy.state

    def play(self, uploads: Sequence[Sent]) -> Outcome:
        state, layout, t = self.state, self.upload_layout, self.state.round
        grid = FakeGrid({_node(s.client): partial(self._reply, s) for s in uploads})
        messages = self._strategy.configure_train(t + 1, self._arrays, ConfigRecord(), grid)
        replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages)}
        arrays, _ = self._strategy.aggregate_train(
            t + 1, [replies[_node(sent.client)] for sent in uploads]
        )
        assert arrays is not None
        self._arrays = arrays
        personal = {
            sent.client: row_from_tensors(waiting, layout)
            for sent in uploads
            if (waiting := personal_of(self.state, sent.client))
        }
        return self._outcome(self._row(arrays, state.layout), personal)

    def announced(self) -> Announcement:
        return self._strategy.announcement

    def _reply(self, sent: Sent, message: Message, context: Context) -> Message:
        state = self.state
        if sent.client not in self.ranks:
            received = self._row(message.content["arrays"], state.layout)
            assert torch.equal(received, state.row), "the message holds another global row"
        named = sent.named(self.upload_layout)
        content: dict[str, Any] = {
            "arrays": to_arrays({self.start.keys[name]: named[name] for name in named}),
            "metrics": MetricRecord({"num-examples": sent.weight}),
        }
        if sent.statistics:
            content["told"] = to_arrays(sent.statistics)
        if sent.round is not None:
            content["fedcore"] = ConfigRecord({"round": sent.round})
        if sent.says is not None:
            announced = RoundConfig.read(message.content).announced
            assert announced is not None
            content["fedcore"] = ReplyInfo(said=sent.says(announced)).record()
        return Message(RecordDict(content), reply_to=message)

    def _row(self, arrays: ArrayRecord, layout: FactorLayout) -> Tensor:
        return row_from_tensors(from_arrays(arrays), layout, held=self.start.constants)


def _node(client: str) -> int:
    return int(client.removeprefix("node-"))


class NVFlare(Federation):
    """Models of NVFlare, accepted one by one."""

    def open(self) -> None:
        start = write_adapter(self.start, self.folder / "start")
        self._aggregator = FedLoRAAggregator(
            str(start),
            self.method.name,
            options_of(self.method),
            on_invalid=self.on_invalid,
            allow_identical_uploads=self.allow_identical_uploads,
        )
        persistor = AdapterPersistor(str(start), str(self.folder / "final"))
        self._meta = persistor.load_model(None)["meta"]

    @property
    def state(self) -> ServerState:
        return self._aggregator.state

    def announced(self) -> Announcement:
        return Announcement.parse(self._meta[ANNOUNCED], "the global model")

    def play(self, uploads: Sequence[Sent]) -> Outcome:
        layout, t = self.upload_layout, self.state.round
        for sent in uploads:
            model = FLModel(
                params_type="FULL",
                params={self.start.keys[n]: tensor for n, tensor in sent.named(layout).items()},
                current_round=t if sent.round is None else sent.round,
                meta={"client_name": sent.client, NUM_STEPS: sent.weight},
            )
            if sent.says is not None:
                model.meta[ANNOUNCED] = sent.says(self.announced()).text()
            self._aggregator.accept_model(model)
        served = self._aggregator.aggregate_model()
        self._meta = served.meta
        tensors = {key: torch.from_numpy(value) for key, value in served.params.items()}
        row = row_from_tensors(tensors, self.state.layout, held=self.start.constants)
        return self._outcome(row, {})


class FlowerWithConfig(Flower):
    """The same with a server that knows the adapter's configuration."""

    knows_adapter = True


TRANSPORTS: Mapping[str, type[Federation]] = {
    "direct": Direct,
    "direct from round 1": DirectFromRoundOne,
    "local": Local,
    "folders": Folders,
    "flower": Flower,
    "nvflare": NVFlare,
}

ANNOUNCING: Mapping[str, type[Federation]] = {
    "folders": Folders,
    "flower": Flower,
    "flower with config": FlowerWithConfig,
    "nvflare": NVFlare,
}
"""Those whose messages announce what uploads have to repeat."""


def start_adapter(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> AdapterState:
    """An adapter of ``family`` away from zero, for modules of several shapes and a head.

    Its scaling is 2, and a Gram adapter has constants, neither of which may change anything.
    """
    layout = family_layout(family, RANK)
    row = (0.5 * random_row(layout, seed)).to(dtype)
    tensors = {}
    for slot in layout:
        key = f"base_model.model.{slot.module}"
        if slot.factor:
            key += f".{family}_{slot.factor}{_SUFFIX[family]}"
        tensors[key] = tensors_from_row(row, layout)[slot.name]
        if family == "gram" and slot.factor:
            tensors[key + "0"] = tensors[key].clone()
    config: dict[str, object] = {"r": RANK, "lora_alpha": 2 * RANK}
    if family != "none":
        config["peft_type"] = family.upper()
    return AdapterState.from_peft(tensors, config)
