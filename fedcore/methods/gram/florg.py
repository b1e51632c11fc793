"""FLoRG: one Gram factor per layer, aggregated as Grams and aligned by Procrustes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods.base import (
    EMPTY_ROUND,
    Aggregate,
    Broadcast,
    Capabilities,
    Description,
    Family,
    Method,
    StepReport,
    checked_ranks,
    unchanged,
)
from fedcore.methods.shared.linear import LinearMethod
from fedcore.methods.shared.reports import rank_flags, steps_of
from fedcore_kernels import florg_round, truncated_step

_SOURCE = "arXiv 2602.17095"


@dataclass(frozen=True)
class FlorgTruncated(Method):
    """The best rank-r Gram of ``Q = sum w_n A_n^T A_n``, rotated towards the previous factor.

    The model is ``W0 + s left A^T A right`` with fixed frames; ``A (r, k)`` is all that trains and
    travels. With ``F = [sqrt(w_n) A_n]`` the server takes the top eigenvectors ``U`` of the dual
    Gram ``F F^T``, forms ``Til = U^T F`` and broadcasts ``O Til`` with ``O`` the orthogonal matrix
    that brings it nearest to the previous factor (square Procrustes, reflections allowed). The Gram
    error is the Eckart-Young tail; it is exact when ``rank Q <= r``.

    ``align=False`` leaves the factor in its principal gauge (orthogonal rows of falling norm). The
    model is the same; the difference matters only to an optimiser that remembers earlier rounds.

    A client of rank ``r_n < r`` receives the best Gram of that rank, rotated towards the leading
    rows of what it held. An adapter that subtracts its initial Gram then starts, at such a client,
    short of the part of that Gram which ``r_n`` directions cannot hold.

    Clients keep the moments of a persistent optimiser as they are: alignment exists so that
    they stay meaningful.

    Source: FLoRG, arXiv 2602.17095.
    """

    align: bool = True

    name: ClassVar[str] = "florg.truncated"
    aliases: ClassVar[tuple[str, ...]] = ("florg", "FLoRG")
    family: ClassVar[Family] = "gram"
    variant: ClassVar[Literal["truncated", "sketched"]] = "truncated"
    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=True, history="alignment", any_rank=True
    )
    description: ClassVar[Description] = Description(
        summary="Gram adapter, best rank-r Gram, Procrustes-aligned",
        paper=_SOURCE,
        exact="when rank Q <= r, otherwise the best rank r",
        uplink="r k",
        downlink="r k",
        server_cost="m^2 k + 9 m^3 + 4 r m k, m = N r",
    )

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """One fused round over all modules; dense tensors are averaged.

        Raises:
            FedcoreError: the previous factor of a module is zero, from which no direction comes.
        """
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        layout = cohort.layout
        if layout != previous.layout:
            raise FedcoreError("florg uploads hold every trained tensor; this layout does not")
        for slot in layout.factor_slots:
            if not bool(layout.view(previous.row, slot).any()):
                raise FedcoreError(
                    f"{slot.name} of the previous state is zero; it has no direction"
                )
        result = florg_round(
            cohort.updates,
            cohort.weights,
            previous.row,
            layout,
            variant=self.variant,
            align=self.align,
        )
        steps: dict[str, StepReport] = {}
        flags: list[str] = []
        for group, step in result.steps.items():
            reports = steps_of(group.modules, step.rank, step.condition, step.gap)
            steps |= reports
            flags += rank_flags(layout, reports)
        return Aggregate(result.row.to(previous.row.dtype), layout, steps, tuple(flags))

    def for_client(self, state: Broadcast, held: Broadcast, ranks: Sequence[int]) -> Tensor:
        """The best Gram of the client's ranks, aligned with the leading rows of ``held``.

        Leading rows of the global factor would not be the best of their rank once it was rotated.
        """
        layout, rank_of = state.layout, checked_ranks(state.layout, ranks)
        row = state.row.clone()
        one = torch.ones(1, dtype=torch.float64)
        for group in layout.groups:
            factors, before, out = group.view(state.row), group.view(held.row), group.view(row)
            for rank in {rank_of[module] for module in group.modules} - {group.rows}:
                where = [j for j, module in enumerate(group.modules) if rank_of[module] == rank]
                step = truncated_step(
                    factors[None, where], one, before[where][:, :rank], rank, align=self.align
                )
                out[where] = F.pad(step.factor, (0, 0, 0, group.rows - rank)).to(row.dtype)
        return row


@dataclass(frozen=True)
class FlorgSketched(FlorgTruncated):
    """The literal server rule of the paper: rectangular Procrustes on the full-rank factor.

    Equal to ``A = K^{-1/2} A_prev Q`` with ``K = A_prev Q A_prev^T``, so that
    ``A^T A = Q A_prev^T K^{-1} A_prev Q`` is the Nystrom approximation of ``Q`` sketched by the
    previous factor: no eigenproblem beyond r x r. The Gram never gains energy. It is not the
    minimiser that the rule is derived from once ``rank Q > r``, and differs from ``truncated`` at
    third order in the local step.

    Source: FLoRG, arXiv 2602.17095.
    """

    name: ClassVar[str] = "florg.sketched"
    aliases: ClassVar[tuple[str, ...]] = ()
    variant: ClassVar[Literal["truncated", "sketched"]] = "sketched"
    # The whitened upload form is linear; this is the batch form, which needs every factor.
    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=True, history="previous")
    description: ClassVar[Description] = Description(
        summary="Gram adapter, the paper's rectangular Procrustes (a Nystrom step)",
        paper=_SOURCE,
        exact="when rank Q <= r, otherwise the Nystrom approximation",
        uplink="r k",
        downlink="r k",
        server_cost="4 r m k, m = N r",
    )


@dataclass(frozen=True)
class FlorgAvgA(LinearMethod):
    """Average the Gram factor itself: ``A = sum w_n A_n``.

    The honest baseline of FLoRG: same adapter, same traffic, no server work. It misses the
    covariance ``sum w_n (A_n - Abar)^T (A_n - Abar)`` of the Gram.
    """

    name: ClassVar[str] = "florg.avg_a"
    aliases: ClassVar[tuple[str, ...]] = ("avg_a",)
    family: ClassVar[Family] = "gram"
    capabilities: ClassVar[Capabilities] = Capabilities(linear=True, history="none")
    description: ClassVar[Description] = Description(
        summary="Gram adapter, FedAvg of A: FLoRG's honest baseline",
        paper="baseline",
        exact="no: misses the covariance of A",
        uplink="r k",
        downlink="r k",
        server_cost="2 N r k",
    )
