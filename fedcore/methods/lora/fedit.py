"""FedIT: FedAvg of the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcore.methods.base import Capabilities, Description, Family
from fedcore.methods.shared.linear import LinearMethod


@dataclass(frozen=True)
class FedIT(LinearMethod):
    """Average ``A`` and ``B`` separately: ``Abar = sum w_n A_n``, ``Bbar = sum w_n B_n``.

    Cheapest and linear, but not the mean of the products: the error is the weighted covariance
    ``sum w_n (B_n - Bbar)(A_n - Abar)``. Rotating one client's factors, which leaves its
    model as it is, changes the result.

    Source: Towards Building the Federated GPT: Federated Instruction Tuning, arXiv 2305.05644.
    """

    name: ClassVar[str] = "fedit"
    aliases: ClassVar[tuple[str, ...]] = ("fedavg", "FedIT", "FedAvg")
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(linear=True, history="none")
    description: ClassVar[Description] = Description(
        summary="FedAvg of the two factors",
        paper="arXiv 2305.05644",
        exact="no: misses the covariance of the factors",
        uplink="r (d_in + d_out)",
        downlink="r (d_in + d_out)",
        server_cost="2 N r (d_in + d_out)",
    )
