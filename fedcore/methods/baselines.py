"""The baselines: a head alone, the whole model, every client alone, one holder of all data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.data.cohort import Cohort
from fedcore.methods.base import (
    Aggregate,
    Broadcast,
    Capabilities,
    ClientPlan,
    Description,
    Family,
    Method,
    unchanged,
)
from fedcore.methods.shared.linear import LinearMethod


@dataclass(frozen=True)
class HeadOnly(LinearMethod):
    """FedAvg of the head over a frozen model: what adapters must beat to be worth their traffic."""

    name: ClassVar[str] = "head_only"
    family: ClassVar[Family] = "none"
    capabilities: ClassVar[Capabilities] = Capabilities(always_exact=True, linear=True)
    description: ClassVar[Description] = Description(
        summary="no adapter, FedAvg of the head",
        paper="baseline",
        exact="yes",
        uplink="0",
        downlink="0",
        server_cost="0",
    )


@dataclass(frozen=True)
class FullParameters(LinearMethod):
    """FedAvg of all parameters, without an adapter: full-parameter fine-tuning.

    What adapters save is counted against it, and what they lose in quality. Its source is
    McMahan et al., arXiv 1602.05629, algorithm 1.
    """

    name: ClassVar[str] = "fedavg.full"
    family: ClassVar[Family] = "none"
    capabilities: ClassVar[Capabilities] = Capabilities(
        always_exact=True, linear=True, whole_model=True
    )
    description: ClassVar[Description] = Description(
        summary="FedAvg of every parameter, no adapter",
        paper="arXiv 1602.05629",
        exact="yes",
        uplink="d_in d_out",
        downlink="d_in d_out",
        server_cost="2 N d_in d_out",
    )


@dataclass(frozen=True)
class LocalOnly(Method):
    """No exchange at all; each client keeps its own LoRA adapter and head from round to round.

    What federation must beat. There is no global model: accuracies are means over the clients'
    own models.
    """

    name: ClassVar[str] = "local_only"
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(
        linear=True, mixed_ranks=True, personalised=True, population="alone"
    )
    description: ClassVar[Description] = Description(
        summary="every client alone, nothing exchanged",
        paper="baseline",
        exact="no global model",
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


@dataclass(frozen=True)
class Centralised(LinearMethod):
    """LoRA on the pooled data: what federation gives up for privacy.

    One client holds everything and makes as many local steps per round as all clients together
    would. No traffic is counted.
    """

    name: ClassVar[str] = "centralised"
    aliases: ClassVar[tuple[str, ...]] = ("centralized", "pooled")
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(
        always_exact=True, linear=True, population="pooled"
    )
    description: ClassVar[Description] = Description(
        summary="one client with all the data",
        paper="baseline",
        exact="yes",
        uplink="0",
        downlink="0",
        server_cost="0",
        privacy_note="all data is in one place",
    )
