"""Baseline: every client fine-tunes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcore.data.cohort import Cohort
from fedcore.methods.base import Aggregate, Broadcast, ClientPlan, Family, Method, Traits, unchanged


@dataclass(frozen=True)
class LocalOnly(Method):
    """No exchange at all; each client keeps its own LoRA adapter and head from round to round.

    What federation must beat. There is no global model: accuracies are means over the clients'
    own models.
    """

    name: ClassVar[str] = "local_only"
    summary: ClassVar[str] = "every client alone, nothing exchanged"
    paper: ClassVar[str] = "baseline"
    family: ClassVar[Family] = "lora"
    population: ClassVar[Literal["clients", "alone", "pooled"]] = "alone"
    traits: ClassVar[Traits] = Traits(
        exact="no global model",
        linear=True,
        mixed_ranks=True,
        personalised=True,
        streaming=True,
        uplink="0",
        downlink="0",
        server_cost="0",
        privacy_note="nothing leaves a client",
    )

    def plan(self, round: int) -> ClientPlan:
        """Train both factors, send nothing."""
        return ClientPlan(frozenset("AB"), frozenset(), sends_dense=False)

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """Keeps the initial state: there is nothing to aggregate."""
        return unchanged(previous, "clients train alone")
