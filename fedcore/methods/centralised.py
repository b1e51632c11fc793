"""Baseline: one holder of all the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcore.methods.base import Family, Traits
from fedcore.methods.linear import LinearMethod


@dataclass(frozen=True)
class Centralised(LinearMethod):
    """LoRA on the pooled data: what federation gives up for privacy.

    One client holds everything and makes as many local steps a round as all clients together
    would. No traffic is counted.
    """

    name: ClassVar[str] = "centralised"
    aliases: ClassVar[tuple[str, ...]] = ("centralized", "pooled")
    summary: ClassVar[str] = "one client with all the data"
    paper: ClassVar[str] = "baseline"
    family: ClassVar[Family] = "lora"
    population: ClassVar[Literal["clients", "alone", "pooled"]] = "pooled"
    traits: ClassVar[Traits] = Traits(
        exact="yes",
        linear=True,
        mixed_ranks=False,
        personalised=False,
        streaming=True,
        uplink="0",
        downlink="0",
        server_cost="0",
        privacy_note="all data is in one place",
    )
