"""FFA-LoRA: a common frozen A, only B is trained and sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.data.cohort import Cohort
from fedcore.methods.base import Aggregate, Broadcast, ClientPlan, Family, History, Traits
from fedcore.methods.shared.linear import LinearMethod, with_held_rows


@dataclass(frozen=True)
class FFA(LinearMethod):
    """Freeze a common random ``A``, average ``B``: ``sum w_n B_n A = Bbar A`` exactly.

    A client of lower rank takes the leading rows of ``A`` and leaves the columns of ``B`` beyond
    its rank as they are.

    The model can move only in the row space of ``A``. Clients whose ``A`` is not bit-equal to the
    broadcast are refused: a perturbation of 1e-3 on one of five already costs 6e-4 in the product.

    Source: Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313.
    """

    name: ClassVar[str] = "ffa"
    aliases: ClassVar[tuple[str, ...]] = ("ffa_lora", "FFA-LoRA")
    summary: ClassVar[str] = "A random and frozen, B averaged"
    paper: ClassVar[str] = "arXiv 2403.12313"
    family: ClassVar[Family] = "lora"
    history: ClassVar[History] = "none"
    traits: ClassVar[Traits] = Traits(
        exact="yes",
        linear=True,
        mixed_ranks=True,
        personalised=False,
        streaming=True,
        uplink="r d_out",
        downlink="r d_out",
        server_cost="2 N r d_out",
    )

    def plan(self, round: int) -> ClientPlan:
        """Train and send ``B`` in every round."""
        return ClientPlan(trains=frozenset("B"), sends=frozenset("B"))

    def completed(self, cohort: Cohort, previous: Broadcast) -> Cohort:
        """Clients of lower rank leave the rows that they lack as they are."""
        return with_held_rows(cohort, previous)

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The weighted mean of what was sent, rows that a client lacks standing as they were."""
        return super().aggregate(self.completed(cohort, previous), previous)
