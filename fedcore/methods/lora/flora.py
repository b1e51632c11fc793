"""FLoRA: the clients' factors under each other, which add up to the exact mean update."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import ClassVar

import torch

from fedcore.checks import count
from fedcore.data.cohort import Cohort
from fedcore.data.low_rank import LowRank
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
    unchanged,
)
from fedcore.methods.shared.factor_pairs import fresh_adapter, pair_groups
from fedcore.methods.shared.uploads import check_whole_upload, with_dense_means


@dataclass(frozen=True)
class Flora(Method):
    """Stack the factors, move the product into the base weights, start a fresh adapter.

        M = sum_n w_n B_n A_n = [w_1 B_1 ... w_N B_N] [A_1; ...; A_N]

    The stack has rank ``m``, the sum of the ranks that this round's clients really have, and its
    product is M whatever those ranks are: weights stand on one side only, and the rows that pad a
    lower rank are left out. It is the round's residual. Every round stands alone, because the next
    uploads are updates of base weights that hold all rounds before. Dense tensors are averaged.

    The next adapter has ``B = 0`` and a random ``A`` (``fresh_adapter``), drawn from ``seed``, the
    round and the module. Clients draw it themselves, so only the residual and the dense tensors
    travel down. Optimiser moments of the last adapter mean nothing for the new one.

    Costs: the downlink grows with the number of clients. Beyond ``max_rank`` the round is refused;
    :class:`~fedcore.methods.lora.florist.Florist` sends the same update at a lower rank.

    Failure modes: every client receives every other client's factors as they were uploaded, so
    there is no privacy between clients; and behind a sum-only aggregator the stack would be N
    copies of one mean, so it needs every upload.

    Source: FLoRA, arXiv 2409.05976.

    Raises:
        FedcoreError: ``max_rank`` is not a positive integer, or ``seed`` not an integer.
    """

    max_rank: int | None = None
    seed: int = 0

    name: ClassVar[str] = "flora"
    aliases: ClassVar[tuple[str, ...]] = ("FLoRA", "stacking")
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(
        always_exact=True, mixed_ranks=True, restarts=True, updates_base=True, history="none"
    )
    description: ClassVar[Description] = Description(
        summary="all factors stacked into the base weights, any client ranks",
        paper="arXiv 2409.05976",
        exact="yes",
        uplink="r (d_in + d_out)",
        downlink="m (d_in + d_out), m = sum of the clients' ranks",
        server_cost="m d_out",
        privacy_note="every client receives every other client's factors verbatim",
    )

    def __post_init__(self) -> None:
        if self.max_rank is not None:
            count(self.name, "max_rank", self.max_rank, least=1, otherwise=", or None")
        count(self.name, "seed", self.seed)

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The stacked factors as the residual, a fresh adapter, dense tensors averaged.

        ``changed`` holds the dense tensors alone: clients draw the adapter.

        Raises:
            FedcoreError: a module's stacked rank is above ``max_rank``, or the uploads do not hold
                every tensor of the broadcast.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        check_whole_upload(cohort, previous, self.name)
        layout, shares = cohort.layout, cohort.shares
        # A client without weight has no part in the stack; nobody needs to see its factors.
        ranks = torch.where(shares[:, None] > 0, cohort.ranks, 0)
        stacked = dict(zip(layout.modules, ranks.sum(0).tolist(), strict=True))
        self._check_ranks(cohort.round, stacked)
        mean = with_dense_means(cohort, previous)
        row = fresh_adapter(mean, layout, self.seed, self.name, cohort.round)
        residual: dict[str, LowRank] = {}
        columns = {module: j for j, module in enumerate(layout.modules)}
        for group in pair_groups(layout):
            outer, inner = group.stacks(cohort.updates)
            for j, module in enumerate(group.modules):
                real_ranks = ranks[:, columns[module]]
                real = (torch.arange(group.rank) < real_ranks[:, None]).to(row.device)
                weights = shares.repeat_interleave(real_ranks).to(row.device)[:, None]
                residual[module] = LowRank(
                    (weights * outer[:, j][real]).to(row.dtype), inner[:, j][real].to(row.dtype)
                )
        steps = {module: StepReport(rank, nan, nan) for module, rank in stacked.items()}
        return Aggregate(row, layout.select((), dense=True), steps, residual=residual)

    def _check_ranks(self, round: int, stacked: dict[str, int]) -> None:
        for module, rank in stacked.items():
            if self.max_rank is not None and rank > self.max_rank:
                raise FedcoreError(
                    f"round {round}: the clients' factors of {module} stack to rank {rank}, above "
                    f"max_rank {self.max_rank} of {self.name}; florist sends the same update at a "
                    "lower rank"
                )
