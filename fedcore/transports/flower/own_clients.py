"""What a client of one's own app says of itself, in one line of its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedcore.data.adapter_kind import kind_of
from fedcore.data.announcement import Announcement, differences, scalings_of
from fedcore.data.base_identity import BaseIdentity
from fedcore.data.peft_keys import parse_key
from fedcore.errors import FedcoreError
from fedcore.transports.flower.messages import BF16_TAG, ReplyInfo, RoundConfig


def repeat(
    content: RecordDict, adapter_config: Mapping[str, Any], base: BaseIdentity | None = None
) -> ConfigRecord:
    """The record 'fedcore' for the reply of a client of your own, to be made before it trains.

    It repeats the round and the broadcast of a message, so that a reply of an earlier round is
    refused, and says what the client's adapter and base are::

        record = repeat(message.content, model.peft_config["default"].to_dict(), identity_of(model))
        ...
        reply = RecordDict({"arrays": trained, "metrics": metrics, "fedcore": record})

    Args:
        content: of a message of :class:`FedLoRA`.
        adapter_config: the client's own, as in ``adapter_config.json``.
        base: of the client's model.

    Raises:
        FedcoreError: the adapter or the base is not what the message announces.
    """
    round_config = RoundConfig.read(content)
    announced = round_config.announced or Announcement(round_config.round)
    keys = {key for record in content.array_records.values() for key in record}
    meanings = [parse_key(key.removesuffix(BF16_TAG)) for key in keys]
    modules = {m.module for m in meanings if m.role == "factor"} | set(announced.scaling)
    if base is not None:
        base = base.without(m.module for m in meanings if m.role == "dense")
    scaling = scalings_of(adapter_config, sorted(modules))
    said = announced.answer(base, kind_of(adapter_config), scaling)
    problem, _ = differences(said, announced, allow=announced.allow)
    if problem is not None:
        raise FedcoreError(f"this client does not fit round {round_config.round}: {problem}")
    return ReplyInfo(round=round_config.round, said=said).record()
