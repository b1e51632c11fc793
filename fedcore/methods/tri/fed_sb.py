"""Fed-SB: frozen common bases, only the core between them is trained and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fedcore.checks import choice
from fedcore.methods.base import Capabilities, ClientPlan, Description, Family
from fedcore.methods.shared.linear import LinearMethod

Init = Literal["random", "xs"]


@dataclass(frozen=True)
class FedSB(LinearMethod):
    """Freeze common ``A`` and ``B``, average the cores: ``sum w_n B R_n A = B Rbar A`` exactly.

    The update is ``s B R A`` with ``R`` of size ``r x r``, so traffic does not grow with the width
    of the model. What it can learn is fixed with the bases: an ideal update ``D`` leaves
    ``||D - P_B D P_A||`` behind, ``P_B`` and ``P_A`` the projections onto the bases, however long
    it trains. With orthonormal bases and ``s = 1``, gradient descent on ``R`` is gradient descent
    on the weight along ``P_B g P_A``. ``init`` says which bases the federation starts from:

    ``"xs"``: the leading singular vectors of the base weight, as LoRA-XS; costs one SVD a module.
    ``"random"``: orthonormal from a seed; needs no weight, so it also fits a quantised base.

    The bases of the paper itself, from the first step of full fine-tuning, need a dense statistic
    of data; ``fedcore.tuners.apply_sb`` sets them on an adapter of ``init="sb"``, and the rounds
    are these.

    Privacy: a sum suffices, and noise on ``R`` alone has no cross term. Clients whose bases are not
    bit-equal to the broadcast are refused.

    Failure modes: at a small rank random bases capture almost nothing, ``r^2 / (d_out d_in)`` of
    the energy of a random direction on average, so it needs a larger rank than LoRA; at equal
    traffic the rank may be far larger. With ``"xs"`` the core's gradient scales with the singular
    values of the base weight, so a learning rate that suits one start need not suit the other.

    Source: Fed-SB, arXiv 2502.15436; LoRA-XS, arXiv 2405.17604; LoRA-SB, arXiv 2411.19557.

    Raises:
        FedcoreError: ``init`` is unknown.
    """

    init: Init = "xs"

    name: ClassVar[str] = "fed_sb"
    aliases: ClassVar[tuple[str, ...]] = ("fedsb", "Fed-SB")
    family: ClassVar[Family] = "tri"
    capabilities: ClassVar[Capabilities] = Capabilities(always_exact=True, linear=True)
    description: ClassVar[Description] = Description(
        summary="common frozen bases, the r x r core averaged",
        paper="arXiv 2502.15436",
        exact="yes",
        uplink="r^2",
        downlink="r^2",
        server_cost="2 N r^2",
    )

    def __post_init__(self) -> None:
        choice(self.name, "init", self.init, get_args(Init))

    @property
    def adapter_options(self) -> Mapping[str, Any]:
        """The bases that the adapter starts from."""
        return {"init": self.init}

    def plan(self, round: int) -> ClientPlan:
        """Train and send ``R`` in every round."""
        return ClientPlan(trains=frozenset("R"), sends=frozenset("R"))
