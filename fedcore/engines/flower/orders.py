"""What server and clients say to each other besides tensors, in a ConfigRecord or MetricRecord."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedcore.errors import FedcoreError

RECORD = "fedcore"
"""The ConfigRecord of a reply that says who sends it and what it holds."""

PERSONAL, RESIDUAL, BROADCAST, TOLD = "personal", "residual", "broadcast", "told"
"""Further ArrayRecords: a client's own values, the base weights' update, the global adapter at the
server's ranks, and what a client tells of its data."""


@dataclass(frozen=True)
class Order:
    """The server's order of a round, in the message's ConfigRecord.

    Attributes:
        round: counted from 0; Flower's own ``server-round`` is one more.
        method: the method's name.
        trains, sends: the factors that train and that are sent in this round.
        whole: whether the message holds the whole adapter, or what is new to this client.
        tell: whether the client is to tell of its data.
    """

    round: int
    method: str
    trains: str
    sends: str
    whole: bool
    tell: bool

    def write(self, config: ConfigRecord) -> None:
        """Add the order to ``config``."""
        for name, value in vars(self).items():
            config[f"{RECORD}.{name}"] = value
        config["server-round"] = self.round + 1

    @classmethod
    def read(cls, content: RecordDict) -> Order:
        """The order in a message.

        Raises:
            FedcoreError: the message holds none.
        """
        for config in content.config_records.values():
            if f"{RECORD}.round" in config:
                values: dict[str, Any] = {
                    name: config[f"{RECORD}.{name}"] for name in cls.__dataclass_fields__
                }
                return cls(**values)
        raise FedcoreError("the message is no order of FedLoRA: it names no round")


@dataclass(frozen=True)
class Reply:
    """What a client says of its upload; a client that says nothing is known by its node.

    Attributes:
        client: its own name, empty for that of its node.
        round: the round it trained for, -1 where it does not say.
        frozen: digest of what it must not have changed, empty where it does not say.
        flags: trouble that it met.
        threads: on which its process computes, 0 where it does not say.
    """

    client: str = ""
    round: int = -1
    frozen: str = ""
    flags: tuple[str, ...] = ()
    threads: int = 0

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
        return record

    @classmethod
    def read(cls, content: RecordDict) -> Reply:
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
        return cls(client, round, frozen, lines, threads)
