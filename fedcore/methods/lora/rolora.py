"""RoLoRA: the two factors take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.methods.base import Capabilities, ClientPlan, Description, Family
from fedcore.methods.shared.linear import LinearMethod


@dataclass(frozen=True)
class RoLoRA(LinearMethod):
    """Train, send and average ``B`` in even rounds and ``A`` in odd ones; the other is frozen.

    With one factor common, the mean of the products is the product with the mean factor, so the
    aggregation is exact in both phases. ``B`` goes first: while it is zero, ``A`` has no gradient.
    A client of lower rank trains the leading rows and leaves the others as they are.
    The phase follows from the server's round alone, so evaluations and restarts cannot shift it.

    Source: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA,
    arXiv 2502.01755.
    """

    name: ClassVar[str] = "rolora"
    aliases: ClassVar[tuple[str, ...]] = ("RoLoRA",)
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(
        always_exact=True, linear=True, mixed_ranks=True
    )
    description: ClassVar[Description] = Description(
        summary="B and A trained in alternate rounds",
        paper="arXiv 2502.01755",
        exact="yes",
        uplink="r d_out or r d_in",
        downlink="r d_out or r d_in",
        server_cost="2 N r d_out or 2 N r d_in",
    )

    def plan(self, round: int) -> ClientPlan:
        """``B`` in even rounds, ``A`` in odd ones."""
        factor = frozenset("A" if round % 2 else "B")
        return ClientPlan(trains=factor, sends=factor)
