"""Baseline: no adapter, only the classifier head is trained and averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.methods.base import Family, Traits
from fedcore.methods.linear import LinearMethod


@dataclass(frozen=True)
class HeadOnly(LinearMethod):
    """FedAvg of the head over a frozen model: what adapters must beat to be worth their traffic."""

    name: ClassVar[str] = "head_only"
    summary: ClassVar[str] = "no adapter, FedAvg of the head"
    paper: ClassVar[str] = "baseline"
    family: ClassVar[Family] = "none"
    traits: ClassVar[Traits] = Traits(
        exact="yes",
        linear=True,
        mixed_ranks=False,
        personalised=False,
        streaming=True,
        uplink="0",
        downlink="0",
        server_cost="0",
    )
