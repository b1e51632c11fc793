"""FLoRA-NA: the factors' combinations whose product is nearest to the mean product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods.base import (
    EMPTY_ROUND,
    Aggregate,
    Broadcast,
    Family,
    History,
    Method,
    Traits,
    unchanged,
)
from fedcore.methods.combination_report import CombinationReport, combination_reports
from fedcore.methods.common_gauge import common_gauge, turned_blocks
from fedcore.methods.nearest_combination import nearest_combination
from fedcore.methods.pair_objective import PairObjective
from fedcore.methods.pairs import check_whole_upload, pair_groups, with_dense_means
from fedcore_kernels import apply_cores, block_grams, rotate

# The Gram blocks of a few modules at a time: two sides, and a copy of each in another order.
_BLOCK_BYTES = 256 << 20


class _Fitted(NamedTuple):
    factors: tuple[Tensor, Tensor]
    reports: list[CombinationReport]


@dataclass(frozen=True)
class FloraNA(Method):
    """Two coefficients a client and module: ``B^ = sum p_n B_n``, ``A^ = sum q_n A_n``.

    On the server ``p`` and ``q`` minimise ``||M - B^ A^||_F^2``, ``M = sum w_n B_n A_n``, module by
    module, by alternating least squares on the Gram blocks of the factors
    (:mod:`fedcore.methods.nearest_combination`), so that rank and traffic stay FedAvg's and nothing
    of a weight's size is formed. Coefficients may be negative and need not sum to 1. Scaled to
    ``||A^|| = ||Abar||`` and ``sum p_n w_n >= 0``.

    Exact for equal clients, one factor common or common up to a scale a client, and equal products
    that differ in gauge; the best rank 1 for r = 1. ``rank M <= r`` alone is not enough. One
    invertible matrix for all clients changes nothing, nor does a scale or sign for each, but a
    rotation for each does: ``align`` turns the clients into one gauge first. When clients start
    from a common state, the gain over FedAvg is a matter of percents, for most of the error lies
    outside of the clients' span; :class:`CombinationReport` bounds what is left.

    Failure modes: a fit may end in a local minimum (three starts are tried), or before it settled,
    in which case the best so far is used and the round flagged. Where the clients cancel
    (``M = 0``) the means are kept if their product is zero, else ``B^ = 0``.

    Attributes:
        align: turn the clients into one gauge before the fit.
        affine: ask for ``sum p_n = sum q_n = 1``, which gives up the repair of scales.
        sweeps: at most so many sweeps from each start.
        tolerance: stop at a gain of this share of ``||M||^2``.
        certify: report the error of the best product of the rank; costs a small SVD a module.

    Source: the problem is FLoRA-NA's, arXiv 2509.26399; the paper does not say how it is solved,
    nor whether a module at a time. Solver, starts, gauge and alignment are our own.

    Raises:
        FedcoreError: ``sweeps`` below 1, or ``tolerance`` outside [0, 1).
    """

    align: bool = False
    affine: bool = False
    sweeps: int = 500
    tolerance: float = 1e-10
    certify: bool = True

    name: ClassVar[str] = "flora_na"
    aliases: ClassVar[tuple[str, ...]] = ("FLoRA-NA",)
    summary: ClassVar[str] = "combinations of the factors nearest to the mean product"
    paper: ClassVar[str] = "arXiv 2509.26399"
    family: ClassVar[Family] = "lora"
    history: ClassVar[History] = "none"
    traits: ClassVar[Traits] = Traits(
        exact="when clients are equal, or a factor is common up to scale",
        linear=False,
        mixed_ranks=False,
        personalised=False,
        streaming=False,
        uplink="r (d_in + d_out)",
        downlink="r (d_in + d_out)",
        server_cost="(d_in + d_out) m^2 + N^3 r^2 + sweeps (N^2 r^2 + N^3), m = N r",
    )

    def __post_init__(self) -> None:
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise FedcoreError(f"flora_na: sweeps is {self.sweeps!r}; pass an integer of 1 or more")
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 <= self.tolerance < 1:
            raise FedcoreError(
                f"flora_na: tolerance is {self.tolerance!r}; pass a number in [0, 1)"
            )

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The nearest combinations of all modules of one shape at a time; dense tensors averaged.

        Raises:
            FedcoreError: clients of different ranks, or uploads that do not hold every tensor of
                the broadcast.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        check_whole_upload(cohort, previous, self.name)
        row = with_dense_means(cohort, previous)
        shares = cohort.shares.to(row.device)
        reports: dict[str, CombinationReport] = {}
        for group in pair_groups(cohort.layout):
            outer, inner = group.stacks(cohort.updates)
            size = max(1, _BLOCK_BYTES // (4 * 8 * (len(cohort) * group.rank) ** 2))
            parts = zip(outer.split(size, dim=1), inner.split(size, dim=1), strict=True)
            found = [self._fit(*part, shares) for part in parts]
            outer, inner = (
                torch.cat(side) for side in zip(*(fit.factors for fit in found), strict=True)
            )
            group.write(row, outer, inner)
            reports |= zip(group.modules, chain(*(fit.reports for fit in found)), strict=True)
        return Aggregate(row, cohort.layout, reports, _flags(reports))

    def _fit(self, left: Tensor, right: Tensor, shares: Tensor) -> _Fitted:
        """The combinations of stacks ``left (N, L, r, d_out)`` and ``right (N, L, r, d_in)``."""
        blocks = block_grams(left), block_grams(right)
        if self.align:
            turns = common_gauge(*blocks, shares)
            blocks = turned_blocks(blocks[0], turns), turned_blocks(blocks[1], turns)
            left, right = (rotate(side.double(), turns.transpose(0, 1)) for side in (left, right))
        objective = PairObjective.build(*blocks, shares)
        fit = nearest_combination(
            objective, sweeps=self.sweeps, tolerance=self.tolerance, affine=self.affine
        )
        factors = _combined(fit.p, left), _combined(fit.q, right)
        reports = combination_reports(left, right, objective, fit, factors, self.certify)
        return _Fitted(factors, reports)


def _combined(coefficients: Tensor, stack: Tensor) -> Tensor:
    """``sum_n c_n factor_n`` of every module, (L, r, k)."""
    # One coefficient serves the whole factor, which is therefore one row of r k numbers here.
    rows = apply_cores(coefficients[:, None, :, None], stack.flatten(2)[:, :, None])
    return rows.view(stack.shape[1:])


def _flags(reports: Mapping[str, CombinationReport]) -> tuple[str, ...]:
    unsettled = sorted(module for module, report in reports.items() if not report.converged)
    if not unsettled:
        return ()
    sweeps = max(reports[module].sweeps for module in unsettled)
    return (
        f"{len(unsettled)} of {len(reports)} modules not settled after {sweeps} sweeps, "
        f"first {unsettled[0]}: the best so far is used",
    )
