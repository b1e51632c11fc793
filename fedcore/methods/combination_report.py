"""What FLoRA-NA's fit of a module achieved, and what no fit could have gone below."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt

import torch
from torch import Tensor

from fedcore.methods.base import StepReport
from fedcore.methods.nearest_combination import Combination
from fedcore.methods.pair_objective import PairObjective, exact_objective
from fedcore_kernels import product_svd
from fedcore_kernels.steps import spread

# Below this share the Gram form of the objective has lost too many digits to be reported.
_TRUSTED = 1e-12


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


def combination_reports(
    left: Tensor,
    right: Tensor,
    objective: PairObjective,
    fit: Combination,
    factors: tuple[Tensor, Tensor],
    certify: bool,
) -> list[CombinationReport]:
    """A report a module.

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
    own = product_svd(factors[0][None], factors[1][None], [1.0])
    floor = gap = torch.full_like(value, torch.nan)
    if certify:
        best = product_svd(left, right, shares, left.shape[2])
        floor, gap = best.tail.square(), best.gap
    columns = (
        own.rank,
        spread(own.values, own.rank),
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


def _trusted(
    left: Tensor, right: Tensor, objective: PairObjective, p: Tensor, q: Tensor, value: Tensor
) -> Tensor:
    """``value``, found anew without cancellation where its Gram form has no digits left."""
    small = (value <= _TRUSTED * objective.scale).nonzero()[:, 0]
    if not len(small):
        return value
    exact = exact_objective(left[:, small], right[:, small], objective.shares, p[small], q[small])
    return value.index_copy(0, small, exact)
