"""FFA-LoRA: a common frozen A, only B is trained and sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.methods.base import Capabilities, ClientPlan, Description, Family
from fedcore.methods.shared.linear import LinearMethod


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
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(
        always_exact=True, linear=True, mixed_ranks=True, history="none"
    )
    description: ClassVar[Description] = Description(
        summary="A random and frozen, B averaged",
        paper="arXiv 2403.12313",
        exact="yes",
        uplink="r d_out",
        downlink="r d_out",
        server_cost="2 N r d_out",
    )

    def plan(self, round: int) -> ClientPlan:
        """Train and send ``B`` in every round."""
        return ClientPlan(trains=frozenset("B"), sends=frozenset("B"))
