"""FedSA-LoRA: A is shared, B and the head stay with the client."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedcore.methods.base import Aggregate, Broadcast, Capabilities, ClientPlan, Description, Family
from fedcore.methods.shared.linear import LinearMethod
from fedcore_kernels import FactorLayout


@dataclass(frozen=True)
class FedSA(LinearMethod):
    """Average ``A`` alone: client n runs ``W0 + B_n Abar`` with ``Abar = sum w_n A_n``.

    Both factors train; ``B_n`` and everything that is not a factor (the head, as in the authors'
    code) never leave the client. There is no global model: the global row holds ``Abar`` beside the
    ``B`` and the head of the start, and a client that joins late begins from those, which with a
    zero ``B`` is the base model. What is known of ``B_n`` is stored under the client's id; a client
    that comes back under another one starts again.

    Rotating one client's factors, which leaves its model as it is, changes ``Abar``. Under least
    squares the best ``A`` for a given ``B`` does not depend on how the client's inputs are
    distributed while the best ``B`` for a given ``A`` does, which is the reason to share ``A``.

    Uploads that bring more than ``A`` lose it before anything is stored, and the round is flagged.

    Source: Selective Aggregation for Low-Rank Adaptation in Federated Learning, arXiv 2410.01463.
    """

    name: ClassVar[str] = "fedsa"
    aliases: ClassVar[tuple[str, ...]] = ("fedsa_lora", "FedSA-LoRA")
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(linear=True, personalised=True)
    description: ClassVar[Description] = Description(
        summary="A averaged, B and the head private to each client",
        paper="arXiv 2410.01463",
        exact="no global model",
        uplink="r d_in",
        downlink="r d_in",
        server_cost="2 N r d_in",
    )

    def plan(self, round: int) -> ClientPlan:
        """Train both factors and the head, send ``A``."""
        return ClientPlan(trains=frozenset("AB"), sends=frozenset("A"), sends_dense=False)

    def from_mean(self, mean: Tensor, layout: FactorLayout, previous: Broadcast) -> Aggregate:
        """``Abar``; whatever else ``mean`` holds is left out, with a flag."""
        shared = layout.select("A", dense=False)
        layout.check(mean, "mean")
        result = super().from_mean(layout.gather(mean, shared), shared, previous)
        extra = [slot.name for slot in layout if slot.name not in shared.by_name]
        if not extra:
            return result
        flag = f"uploads held {len(extra)} tensors that are private, first {extra[0]}: ignored"
        return replace(result, flags=(*result.flags, flag))
