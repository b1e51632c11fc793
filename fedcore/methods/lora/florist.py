"""FLoRIST: the leading singular directions of the mean update that hold a share of its energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedcore.checks import count, number
from fedcore.data.cohort import Cohort
from fedcore.data.low_rank import LowRank
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
from fedcore.methods.shared.reports import steps_of
from fedcore.methods.shared.uploads import check_whole_upload, with_dense_means
from fedcore_kernels import energy_rank, product_svd, spread, tail_and_gap


@dataclass(frozen=True)
class Florist(Method):
    """Truncate the exact mean update to energy ``tau``, move it into the base weights, restart.

    With ``M = sum_n w_n B_n A_n = U S V^T``, for every module

        p = the least number with  sum_{i<=p} S_i^2 >= tau sum_i S_i^2
        residual = (U_p S_p) V_p^T

    M itself is never formed; its singular values come from the QR core of the stacked factors, in
    fp64. Values not above 1e-12 of the largest are rounding and no energy, so ``tau = 1`` keeps
    the rank of M and loses nothing. ``max_rank`` bounds p; where it does, the round is flagged
    with the energy that was kept. A zero M has p = 0 and no residual.

    The error is the tail ``(sum_{i>p} S_i^2)^{1/2}``, at most ``sqrt(1 - tau) ||M||_F``, and no
    other matrix of rank p is nearer. Only the products enter: ``(B_n X, X^{-1} A_n)`` in place of
    ``(B_n, A_n)`` changes nothing. What is dropped is lost for good, each round anew.

    The next adapter has ``B = 0`` and a random ``A`` (``fresh_adapter``), drawn from ``seed``, the
    round and the module by server and clients alike, so only the residual and the averaged dense
    tensors travel down. Optimiser moments of the last adapter mean nothing for the new one.

    Source: FLoRIST, arXiv 2506.09199, which takes two decompositions of the stacks; one of their
    core gives the same.

    Raises:
        FedcoreError: ``tau`` is not a number in (0, 1], ``max_rank`` not a positive integer, or
            ``seed`` not an integer.
    """

    tau: float = 0.9
    max_rank: int | None = None
    seed: int = 0

    name: ClassVar[str] = "florist"
    aliases: ClassVar[tuple[str, ...]] = ("FLoRIST",)
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_ranks=True, restarts=True, updates_base=True, history="none"
    )
    description: ClassVar[Description] = Description(
        summary="leading directions of the mean update into the base weights",
        paper="arXiv 2506.09199",
        exact="when tau = 1, otherwise the best rank p",
        uplink="r (d_in + d_out)",
        downlink="p (d_in + d_out), p by energy",
        server_cost="4 (d_in + d_out) m^2 + 24 m^3 + 2 (d_in + d_out) m p, m = N r",
    )

    def __post_init__(self) -> None:
        number(self.name, "tau", self.tau, above=0, most=1)
        if self.max_rank is not None:
            count(self.name, "max_rank", self.max_rank, least=1, otherwise=", or None")
        count(self.name, "seed", self.seed)

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The leading directions as the residual, a fresh adapter, dense tensors averaged.

        ``changed`` holds the dense tensors alone: clients draw the adapter.

        Raises:
            FedcoreError: the uploads do not hold every tensor of the broadcast.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        check_whole_upload(cohort, previous, self.name)
        layout = cohort.layout
        mean = with_dense_means(cohort, previous)
        row = fresh_adapter(mean, layout, self.seed, self.name, cohort.round)
        residual: dict[str, LowRank] = {}
        steps: dict[str, StepReport] = {}
        short: dict[str, float] = {}
        for group in pair_groups(layout):
            outer, inner = group.stacks(cohort.updates)
            best = product_svd(outer, inner, cohort.weights, self.max_rank)
            wanted = energy_rank(best.values, self.tau)
            ranks = torch.minimum(wanted, best.rank)
            tail, gap = tail_and_gap(best.values, ranks)
            energy = 1 - (tail / torch.linalg.vector_norm(best.values, dim=-1)).square()
            steps |= steps_of(group.modules, ranks, spread(best.values, ranks), gap)
            for j, module in enumerate(group.modules):
                rank = steps[module].rank
                if rank < wanted[j]:
                    short[module] = float(energy[j])
                if rank:
                    sides = (side[j, :rank].to(row.dtype) for side in (best.left, best.right))
                    residual[module] = LowRank(*(side.clone() for side in sides))
        flags: tuple[str, ...] = ()
        if short:
            least = min(short, key=lambda module: short[module])
            flags = (
                f"max_rank {self.max_rank} truncates {len(short)} of {len(layout.modules)} "
                f"modules below tau {self.tau}: {least} keeps {short[least]:.3g} of its energy",
            )
        return Aggregate(row, layout.select((), dense=True), steps, flags, residual)
