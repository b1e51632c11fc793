"""What server and clients say to each other besides tensors, in a ConfigRecord or MetricRecord."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.announcement import ANNOUNCED, Announcement
from fedcore.data.low_rank import packed
from fedcore.data.npy import NpyArray
from fedcore.data.rows import (
    Ranks,
    check_shapes,
    row_from_tensors,
    slot_name,
    tensors_from_row,
)
from fedcore.data.validation import check_rounds
from fedcore.errors import FedcoreError
from fedcore.federation.downloads import Download
from fedcore.federation.state import ServerState, personal_of, statistics_of
from fedcore.methods.base import Method
from fedcore.transports.flower.reply_metrics import read_metrics, read_weight
from fedcore_kernels.layout import FactorLayout

_NUMPY = "numpy.ndarray"

BF16_TAG = ":bf16"
"""The end of the key under which a bf16 tensor travels as int16."""


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A state dict as an ArrayRecord; the order of its keys is kept.

    Raises:
        FedcoreError: a key that ends with the tag of bf16 by itself.
    """
    arrays = {}
    for key, tensor in tensors.items():
        if key.endswith(BF16_TAG):
            raise FedcoreError(f"{key!r} ends with {BF16_TAG!r}, which marks tensors of bf16")
        values = tensor.detach().cpu().contiguous()
        if values.dtype == torch.bfloat16:
            arrays[key + BF16_TAG] = Array(values.view(torch.int16).numpy())
        else:
            arrays[key] = Array(values.numpy())
    return ArrayRecord(arrays)


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The state dict that :func:`to_arrays` made a record of, bit by bit.

    Raises:
        FedcoreError: naming the key of an array that cannot be read.
    """
    return {name: _decoded(array) for name, array in _opened(record).items()}


def _opened(record: ArrayRecord) -> dict[str, tuple[NpyArray, bool]]:
    """Name to an array whose header was checked, and whether its integers stand for bf16.

    Raises:
        FedcoreError: naming the key of an array that cannot be read.
    """
    arrays: dict[str, tuple[NpyArray, bool]] = {}
    for key, array in record.items():
        name = key.removesuffix(BF16_TAG)
        if name in arrays:
            raise FedcoreError(f"{name} is there twice, once as bf16")
        if array.stype != _NUMPY:
            raise FedcoreError(f"{key} is stored as {array.stype[:60]!r}, which is not {_NUMPY!r}")
        try:
            values = NpyArray.open(array.data)
        except FedcoreError as error:
            raise FedcoreError(f"{key} cannot be read: {error}") from None
        if tuple(array.shape) != values.shape:
            raise FedcoreError(f"{key} holds shape {values.shape}, its record says another")
        if key != name and values.dtype != torch.int16:
            raise FedcoreError(f"{key} holds {values.dtype}; bf16 travels as int16")
        arrays[name] = values, key != name
    return arrays


def _decoded(array: tuple[NpyArray, bool]) -> Tensor:
    values, is_bf16 = array
    return values.tensor().view(torch.bfloat16) if is_bf16 else values.tensor()


RECORD = "fedcore"
"""The ConfigRecord of a reply that says who sends it and what it holds."""

PERSONAL, RESIDUAL, BROADCAST, TOLD = "personal", "residual", "broadcast", "told"
"""Further ArrayRecords: a client's own values, the base weights' update, the global adapter at the
server's ranks, and a client's statistics of its data."""


@dataclass(frozen=True)
class RoundConfig:
    """The server's configuration of a round, in the message's ConfigRecord.

    Attributes:
        round: counted from 0; Flower's own ``server-round`` is one more.
        method: the method's name.
        trains, sends: the factors that train and that are sent in this round.
        whole: whether the message holds the whole adapter, or what is new to this client.
        ``tell``: whether the client is to send statistics of its data.
        announced: what the client's reply has to repeat; None from a server of version 0.1.
    """

    round: int
    method: str
    trains: str
    sends: str
    whole: bool
    tell: bool
    announced: Announcement | None = None

    def write(self, config: ConfigRecord) -> None:
        """Add it to ``config``."""
        for name, value in vars(self).items():
            if name != ANNOUNCED:
                config[f"{RECORD}.{name}"] = value
        if self.announced is not None:
            config[f"{RECORD}.{ANNOUNCED}"] = self.announced.text()
        config["server-round"] = self.round + 1

    @classmethod
    def read(cls, content: RecordDict) -> RoundConfig:
        """The configuration in a message.

        Raises:
            FedcoreError: the message holds none, or what it announces cannot be read.
        """
        for config in content.config_records.values():
            if f"{RECORD}.round" in config:
                names = set(cls.__dataclass_fields__) - {ANNOUNCED}
                values: dict[str, Any] = {name: config[f"{RECORD}.{name}"] for name in names}
                return cls(**values, announced=_announcement(config, f"{RECORD}.{ANNOUNCED}"))
        raise FedcoreError(
            "the message is not one of FedLoRA: it names no round; run FedLoRA on the server"
        )


@dataclass(frozen=True)
class ReplyInfo:
    """What a client says of its upload; a client that says nothing is known by its node.

    Attributes:
        client: its own name, empty for that of its node.
        round: the round it trained for, -1 where it does not say.
        frozen: digest of what it must not have changed, empty where it does not say.
        flags: trouble that it met.
        threads: on which its process computes, 0 where it does not say.
        said: what it repeats of the message, and says of its adapter and base; None where it does
            not.
    """

    client: str = ""
    round: int = -1
    frozen: str = ""
    flags: tuple[str, ...] = ()
    threads: int = 0
    said: Announcement | None = None

    def record(self) -> ConfigRecord:
        """As it travels."""
        record = ConfigRecord(
            {
                "client": self.client,
                "round": self.round,
                "frozen": self.frozen,
                "flags": "\n".join(self.flags),
            }
        )
        if self.threads:
            record["threads"] = self.threads
        if self.said is not None:
            record[ANNOUNCED] = self.said.text()
        return record

    @classmethod
    def read(cls, content: RecordDict) -> ReplyInfo:
        """What a reply says, defaults where it does not.

        Raises:
            FedcoreError: a value of another type.
        """
        record = content.config_records.get(RECORD)
        if record is None:
            return cls()
        client, round, frozen, flags = (
            record.get(name, default)
            for name, default in (("client", ""), ("round", -1), ("frozen", ""), ("flags", ""))
        )
        if not (isinstance(client, str) and isinstance(frozen, str) and isinstance(flags, str)):
            raise FedcoreError("its record 'fedcore' holds something else than text")
        if not isinstance(round, int):
            raise FedcoreError(f"its record 'fedcore' names the round {round!r}")
        threads = record.get("threads", 0)
        if not isinstance(threads, int):
            raise FedcoreError(f"its record 'fedcore' names {threads!r} threads")
        lines = tuple(line for line in flags.split("\n") if line)
        return cls(client, round, frozen, lines, threads, _announcement(record, ANNOUNCED))


def _announcement(record: ConfigRecord, key: str) -> Announcement | None:
    text = record.get(key)
    return None if text is None else Announcement.parse(text, f"its record {RECORD!r}")


@dataclass(frozen=True)
class KeyMap:
    """Which key each slot of a row travels under.

    Attributes:
        layout: every factor and dense tensor of the adapter, at the server's ranks.
        keys: slot name to key, as the first adapter had them.
        family: of the adapter.
        constants: name to tensor that nobody changes (initial factors, stored frames).
    """

    layout: FactorLayout
    keys: Mapping[str, str]
    family: str
    constants: Mapping[str, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> tuple[KeyMap, Tensor]:
        """The key map of an adapter ``tensors``, by PEFT's keys, and its row ``(P,)``.

        The row is fp64 where the adapter is, otherwise fp32.

        Raises:
            FedcoreError: no tensor, integers, several adapter families, two keys of one meaning, a
                factor without its partner, or a factor that is not a matrix.
        """
        adapter = AdapterState.from_tensors(tensors)
        check_rounds(adapter, "the adapter")
        layout = adapter.layout()
        key_map = cls(layout, adapter.keys, adapter.family, adapter.constants)
        row = adapter.to_row(layout)
        return key_map, row if row.dtype == torch.float64 else row.float()

    def pack(
        self, row: Tensor, part: FactorLayout, ranks: Ranks | None = None
    ) -> dict[str, Tensor]:
        """The tensors of ``row``, which is of layout ``part``, as a client of ``ranks`` holds them.

        Rows beyond a client's rank are left out.
        """
        tensors = tensors_from_row(row, part, ranks)
        return {self.keys[name]: tensor for name, tensor in tensors.items()}

    def unpack(
        self,
        tensors: Mapping[str, Tensor],
        part: FactorLayout,
        ranks: Ranks | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The row ``(P,)`` of layout ``part``; see :func:`row_from_tensors`.

        Args:
            held: slot name to what else may be there, if it is equal, besides the constants.
        """
        return row_from_tensors(tensors, part, ranks, {**self.constants, **(held or {})})

    def part_of(self, tensors: Mapping[str, Tensor]) -> FactorLayout:
        """The part of the layout that ``tensors`` name; constants are not part of it.

        Raises:
            FedcoreError: a key that the adapter does not have.
        """
        names = {slot_name(key) for key in tensors} - set(self.constants)
        unknown = sorted(names - set(self.layout.by_name))
        if unknown:
            raise FedcoreError(f"{unknown[0]} is not a tensor of the adapter")
        return self.layout.part(names)


def broadcast_content(
    state: ServerState,
    method: Method,
    key_map: KeyMap,
    client: str,
    ranks: Ranks | None,
    download: Download,
    announced: Announcement,
    *,
    config: ConfigRecord,
    arrays_key: str,
    config_key: str,
) -> RecordDict:
    """The content of the message that brings ``download`` to ``client``.

    Args:
        announced: what the reply has to repeat.
        config: the user's; the round's configuration is added to a copy of it.
        arrays_key, config_key: the names under which Flower's strategy sends its records.
    """
    part = download.part
    tensors = key_map.pack(state.layout.gather(download.start, part), part, ranks)
    if not download.known:
        tensors |= {key_map.keys[name]: tensor for name, tensor in key_map.constants.items()}
    plan = method.plan(state.round)
    round_config = RoundConfig(
        round=state.round,
        method=method.name,
        trains=",".join(sorted(plan.trains)),
        sends=",".join(sorted(plan.sends)),
        whole=download.whole,
        tell=method.capabilities.wants_features and not statistics_of(state, client),
        announced=announced,
    )
    sent_config = ConfigRecord(dict(config))
    round_config.write(sent_config)
    content = RecordDict({arrays_key: to_arrays(tensors), config_key: sent_config})
    personal = personal_of(state, client)
    if personal:
        content[PERSONAL] = to_arrays(personal)
    if download.residual:
        content[RESIDUAL] = to_arrays(packed(state.residual))
    if method.capabilities.uploads == "statistics" and ranks is not None:
        content[BROADCAST] = to_arrays(key_map.pack(state.row, state.layout))
    return content


@dataclass(frozen=True)
class ReplyContent:
    """What a reply holds.

    Attributes:
        row: ``(P,)`` in the upload layout of the round.
        weight: the client's, 1 where the server weighs all alike.
        metrics: all that it reports, by name, each one finite number.
        reply: what it says of its upload.
        statistics: what it says of its data, by name.
    """

    row: Tensor
    weight: float
    metrics: Mapping[str, float]
    reply: ReplyInfo
    statistics: Mapping[str, Tensor]


def read_reply(
    content: RecordDict,
    key_map: KeyMap,
    layout: FactorLayout,
    client: str,
    ranks: Ranks | None,
    *,
    unchanged: Mapping[str, Tensor],
    weight_key: str | None,
) -> ReplyContent:
    """One client's upload, a row of ``layout``; its values are not looked at.

    Names and shapes are compared before any array is decoded.

    Args:
        unchanged: slot name to what may come along, if it is equal.
        weight_key: the metric that holds the client's weight; None where all weigh the same.

    Raises:
        FedcoreError: what is wrong with the reply.
    """
    reply = ReplyInfo.read(content)
    if reply.client and reply.client != client:
        raise FedcoreError(f"its reply is from {reply.client!r}")
    records = {name: r for name, r in content.array_records.items() if name != TOLD}
    if len(records) != 1:
        raise FedcoreError(f"its reply has {len(records)} array records; one is needed")
    arrays = _opened(next(iter(records.values())))
    shapes = {name: values.shape for name, (values, _) in arrays.items()}
    check_shapes(shapes, layout, ranks, {**key_map.constants, **unchanged})
    tensors = {name: _decoded(array) for name, array in arrays.items()}
    row = key_map.unpack(tensors, layout, ranks, unchanged)
    metrics = read_metrics(content)
    statistics = content.array_records.get(TOLD)
    return ReplyContent(
        row,
        1.0 if weight_key is None else read_weight(metrics, weight_key),
        metrics,
        reply,
        {} if statistics is None else from_arrays(statistics),
    )
