"""FLoRA-NA: the factors' combinations whose product is nearest to the mean product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from math import nan, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedcore.checks import count, number
from fedcore.data.cohort import Cohort
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
from fedcore.methods.lora.flora_na.objective import PairObjective, exact_objective
from fedcore.methods.lora.flora_na.solver import Combination, nearest_combination
from fedcore.methods.shared.factor_pairs import pair_groups
from fedcore.methods.shared.uploads import check_whole_upload, with_dense_means
from fedcore_kernels import apply_cores, block_grams, procrustes, product_svd, rotate, spread

PASSES = 3
"""How often every client is rotated towards the mean of all."""

# Below this share the Gram form of the objective has lost too many digits to be reported.
_TRUSTED = 1e-12

# The Gram blocks of a few modules at a time: two sides, and a copy of each in another order.
_BLOCK_BYTES = 256 << 20


def _polar(matrix: Tensor) -> Tensor:
    # A partial isometry, as fedcore_kernels.polar gives, would take a part of the client away.
    return procrustes(torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix), matrix)


def align_clients(left: Tensor, right: Tensor, shares: Tensor) -> Tensor:
    """``O_n`` for every module and client, which bring all into one gauge; reflections allowed.

    Begins with the client of the largest share as the reference, then rotates every client towards
    the weighted mean, :data:`PASSES` times. Where the factors are zero the choice is arbitrary,
    but still orthogonal, so that no client's product changes.

    Args:
        left, right: ``(L, N, N, r, r)`` fp64 Gram blocks, :func:`fedcore_kernels.block_grams`.
        shares: ``(N,)`` fp64.

    Returns:
        ``(L, N, r, r)`` fp64; a stack is rotated by :func:`fedcore_kernels.rotate` with
        ``(N, L, r, r)``, its blocks by :func:`rotated_blocks`.
    """
    blocks = left + right
    rotations = _polar(blocks[:, :, shares.argmax()])
    for _ in range(PASSES):
        rotations = _polar(torch.einsum("i,lniac,licd->lnad", shares, blocks, rotations))
    return rotations


def rotated_blocks(blocks: Tensor, rotations: Tensor) -> Tensor:
    """``O_i^T S_ij O_j``, the blocks ``(L, N, N, r, r)`` of rotated factors."""
    return rotations[:, :, None].mT @ blocks @ rotations[:, None]


@dataclass(frozen=True)
class CombinationReport(StepReport):
    """What the fit of one module found out, ``gap`` being that of M at the adapter's rank.

    ``floor <= objective <= ceiling`` up to rounding, all squared Frobenius norms.

    Attributes:
        objective: ``||M - B^ A^||^2``.
        floor: the error of the best product of the same rank, whose factors may leave the clients'
            span; ``nan`` without ``certify``.
        ceiling: the least error among the starts, FedAvg's means being one of them.
        target: ``||M||^2``.
        sweeps: sweeps made from the start that ended best.
        converged: whether the last sweep gained no more than the tolerance.
    """

    objective: float
    floor: float
    ceiling: float
    target: float
    sweeps: int
    converged: bool

    @property
    def error_bounds(self) -> tuple[float, float]:
        """Floor and ceiling as relative errors; ``nan`` where M is zero or not certified."""
        if not self.target > 0:
            return nan, nan
        return sqrt(max(self.floor, 0.0) / self.target), sqrt(max(self.ceiling, 0.0) / self.target)


def _trusted(
    left: Tensor, right: Tensor, objective: PairObjective, p: Tensor, q: Tensor, value: Tensor
) -> Tensor:
    """``value``, found anew without cancellation where its Gram form has no digits left."""
    small = (value <= _TRUSTED * objective.scale).nonzero()[:, 0]
    if not len(small):
        return value
    exact = exact_objective(left[:, small], right[:, small], objective.shares, p[small], q[small])
    return value.index_copy(0, small, exact)


def combination_reports(
    left: Tensor,
    right: Tensor,
    objective: PairObjective,
    fit: Combination,
    factors: tuple[Tensor, Tensor],
    certify: bool,
) -> list[CombinationReport]:
    """One report per module.

    Args:
        left, right: ``(N, L, r, k)`` the stacks that ``objective`` was built from.
        fit: coefficients ``(L, N)``.
        factors: ``(L, r, k)`` the combinations of both stacks.
        certify: find the best error of the rank too.
    """
    shares = objective.shares
    value, ceiling = (
        _trusted(left, right, objective, *point)
        for point in (
            (fit.p, fit.q, fit.value),
            (fit.start_p, fit.start_q, fit.start_value),
        )
    )
    combined = product_svd(factors[0][None], factors[1][None], [1.0])
    floor = gap = torch.full_like(value, torch.nan)
    if certify:
        best = product_svd(left, right, shares, left.shape[2])
        floor, gap = best.tail.square(), best.gap
    columns = (
        combined.rank,
        spread(combined.values, combined.rank),
        gap,
        value,
        floor,
        ceiling,
        objective.target,
        fit.sweeps,
        fit.converged,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [CombinationReport(*row) for row in rows]


class _Fitted(NamedTuple):
    factors: tuple[Tensor, Tensor]
    reports: list[CombinationReport]


def _combined(coefficients: Tensor, stack: Tensor) -> Tensor:
    """``sum_n c_n factor_n`` of every module, (L, r, k)."""
    # One coefficient serves the whole factor, which is therefore one row of r k numbers here.
    rows = apply_cores(coefficients[:, None, :, None], stack.flatten(2)[:, :, None])
    return rows.view(stack.shape[1:])


def _flags(reports: Mapping[str, CombinationReport]) -> tuple[str, ...]:
    unfinished = sorted(module for module, report in reports.items() if not report.converged)
    if not unfinished:
        return ()
    sweeps = max(reports[module].sweeps for module in unfinished)
    return (
        f"{len(unfinished)} of {len(reports)} modules have not converged after {sweeps} sweeps, "
        f"first {unfinished[0]}: the best so far is used",
    )


@dataclass(frozen=True)
class FloraNA(Method):
    """Two coefficients per client and module: ``B^ = sum p_n B_n``, ``A^ = sum q_n A_n``.

    On the server ``p`` and ``q`` minimise ``||M - B^ A^||_F^2``, ``M = sum w_n B_n A_n``, module by
    module, by alternating least squares on the Gram blocks of the factors
    (:mod:`.solver`), so that rank and traffic stay FedAvg's and nothing
    of a weight's size is formed. Coefficients may be negative and need not sum to 1. Scaled to
    ``||A^|| = ||Abar||`` and ``sum p_n w_n >= 0``.

    Exact for equal clients, one factor common or common up to one scale per client, and equal
    products that differ in gauge; the best rank 1 for r = 1. ``rank M <= r`` alone is not enough.
    One invertible matrix for all clients changes nothing, nor does a scale or sign for each, but a
    rotation for each does: ``align`` brings the clients into one gauge first. When clients start
    from a common state, the gain over FedAvg is a matter of percents, for most of the error lies
    outside of the clients' span; :class:`CombinationReport` bounds what is left.

    Failure modes: a fit may end in a local minimum (three starts are tried), or before it
    converged, in which case the best so far is used and the round flagged. Where the clients cancel
    (``M = 0``) the means are kept if their product is zero, else ``B^ = 0``.

    Attributes:
        align: rotate the clients into one gauge before the fit.
        affine: ask for ``sum p_n = sum q_n = 1``, which gives up the repair of scales.
        sweeps: at most so many sweeps from each start.
        tolerance: stop at a gain of this share of ``||M||^2``.
        certify: report the error of the best product of the rank; costs one small SVD per module.

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
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(history="none")
    description: ClassVar[Description] = Description(
        summary="combinations of the factors nearest to the mean product",
        paper="arXiv 2509.26399",
        exact="when clients are equal, or a factor is common up to scale",
        uplink="r (d_in + d_out)",
        downlink="r (d_in + d_out)",
        server_cost="(d_in + d_out) m^2 + N^3 r^2 + sweeps (N^2 r^2 + N^3), m = N r",
    )

    def __post_init__(self) -> None:
        count(self.name, "sweeps", self.sweeps, least=1)
        number(self.name, "tolerance", self.tolerance, least=0, below=1)

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
            fits = [self._fit(*part, shares) for part in parts]
            outer, inner = (
                torch.cat(side) for side in zip(*(fit.factors for fit in fits), strict=True)
            )
            group.write(row, outer, inner)
            reports |= zip(group.modules, chain(*(fit.reports for fit in fits)), strict=True)
        return Aggregate(row, cohort.layout, reports, _flags(reports))

    def _fit(self, left: Tensor, right: Tensor, shares: Tensor) -> _Fitted:
        """The combinations of stacks ``left (N, L, r, d_out)`` and ``right (N, L, r, d_in)``."""
        blocks = block_grams(left), block_grams(right)
        if self.align:
            rotations = align_clients(*blocks, shares)
            blocks = rotated_blocks(blocks[0], rotations), rotated_blocks(blocks[1], rotations)
            by_client = rotations.transpose(0, 1)
            left, right = (rotate(side.double(), by_client) for side in (left, right))
        objective = PairObjective.build(*blocks, shares)
        fit = nearest_combination(
            objective, sweeps=self.sweeps, tolerance=self.tolerance, affine=self.affine
        )
        factors = _combined(fit.p, left), _combined(fit.q, right)
        reports = combination_reports(left, right, objective, fit, factors, self.certify)
        return _Fitted(factors, reports)
