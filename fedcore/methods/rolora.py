"""RoLoRA: the two factors take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.methods.base import ClientPlan, Family, Traits
from fedcore.methods.linear import LinearMethod


@dataclass(frozen=True)
class RoLoRA(LinearMethod):
    """Train, send and average ``B`` in even rounds and ``A`` in odd ones; the other is frozen.

    With one factor common, the mean of the products is the product with the mean factor, so the
    aggregation is exact in both phases. ``B`` goes first: while it is zero, ``A`` has no gradient.
    The phase follows from the server's round alone, so evaluations and restarts cannot shift it.

    Source: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA,
    arXiv 2502.01755.
    """

    name: ClassVar[str] = "rolora"
    aliases: ClassVar[tuple[str, ...]] = ("RoLoRA",)
    summary: ClassVar[str] = "B and A trained in alternate rounds"
    paper: ClassVar[str] = "arXiv 2502.01755"
    family: ClassVar[Family] = "lora"
    traits: ClassVar[Traits] = Traits(
        exact="yes",
        linear=True,
        mixed_ranks=False,
        personalised=False,
        streaming=True,
        uplink="r d_out or r d_in",
        downlink="r d_out or r d_in",
        server_cost="2 N r d_out or 2 N r d_in",
    )

    def plan(self, round: int) -> ClientPlan:
        """``B`` in even rounds, ``A`` in odd ones."""
        factor = frozenset("A" if round % 2 else "B")
        return ClientPlan(trains=factor, sends=factor)
