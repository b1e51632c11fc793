"""Exact optimal transport between small discrete distributions, many pairs at once.

The cost of moving masses ``a (m,)`` onto masses ``b (n,)`` of the same total is

    OT(a, b, C) = min <T, C>  over T >= 0 with row sums a and column sums b
                = max_v  sum_j b_j v_j + sum_i a_i min_j (C_ij - v_j)

The second form needs no test of feasibility: every ``v`` gives a lower bound, and the maximum is
attained where two kinks of the inner minima meet. With three columns (``v_3 = 0``) there are 21
such points, so all pairs of a batch are solved by evaluating the bound there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import FedcoreError, missing_extra

Array = NDArray[np.float64]

SMALL = 3
"""Problems of up to this many atoms per side are solved in batches, larger ones one by one."""

_BATCH = 2048
"""Problems whose intermediate values fit into a second-level cache."""

# Rows whose kinks are paired. In a row's own three kinks all pairs of lines meet in one point.
_EACH, _ALL = [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2, 0, 1, 2, 0, 1, 2]
_OWN, _OTHER = [0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]


def transport_costs(first: Array, second: Array, costs: Array) -> Array:
    """``OT(first_p, second_p, costs_p)`` for every problem of a batch, by exact linear programs.

    Atoms without mass are allowed and change nothing, whatever their finite cost: a batch of
    problems of several sizes is padded with them at the end.

    Args:
        first: ``(P, m)`` non-negative.
        second: ``(P, n)`` non-negative, of the same totals as ``first``.
        costs: ``(P, m, n)`` non-negative and finite.

    Returns:
        ``(P,)``, non-negative; off by some units in the last place of the largest cost.

    Raises:
        FedcoreError: the solver did not finish (more than three atoms per side).
        MissingExtraError: POT is not installed and a problem has more than three atoms per side.

    Example:
        >>> half = np.array([[0.5, 0.5]])
        >>> transport_costs(half, half, np.array([[[0.0, 4.0], [4.0, 1.0]]]))
        array([0.5])
    """
    optima = np.empty(len(costs))
    small = ~(first[:, SMALL:].any(axis=1) | second[:, SMALL:].any(axis=1))
    (places,) = np.nonzero(small)
    for start in range(0, len(places), _BATCH):
        part = places[start : start + _BATCH]
        optima[part] = _three_by_three(
            first[part, :SMALL], second[part, :SMALL], costs[part, :SMALL, :SMALL]
        )
    large = ~small
    if large.any():
        optima[large] = _one_by_one(first[large], second[large], costs[large])
    return optima


def _three_by_three(first: Array, second: Array, costs: Array) -> Array:
    rows = [*first.T, *[np.zeros(len(first))] * (SMALL - first.shape[1])]
    columns = [*second.T, *[np.zeros(len(second))] * (SMALL - second.shape[1])]
    missing = [(0, SMALL - size) for size in costs.shape[1:]]
    c = np.ascontiguousarray(np.pad(costs, [(0, 0), *missing]).transpose(1, 2, 0))
    # Kinks of row i: v_1 = to_third[i], v_2 = from_second[i], v_1 - v_2 = to_second[i].
    to_third, from_second = c[:, 0] - c[:, 2], c[:, 1] - c[:, 2]
    to_second = c[:, 0] - c[:, 1]
    # v = 0 bounds by sums of costs, which no rounding brings below zero.
    zero = np.zeros((1, c.shape[2]))
    v1 = np.concatenate(
        [zero, to_third[_EACH], to_third[_OWN], from_second[_OWN] + to_second[_OTHER]]
    )
    v2 = np.concatenate(
        [zero, from_second[_ALL], to_third[_OWN] - to_second[_OTHER], from_second[_OWN]]
    )
    bound = columns[0] * v1 + columns[1] * v2
    for mass, (to_one, to_two, to_three) in zip(rows, c, strict=True):
        bound += mass * np.minimum(np.minimum(to_one - v1, to_two - v2), to_three)
    return np.asarray(bound.max(0))


def _one_by_one(first: Array, second: Array, costs: Array) -> Array:
    try:
        import ot
    except ImportError:
        raise missing_extra("POT", "run") from None
    optima = np.empty(len(costs))
    for p, (a, b, cost) in enumerate(zip(first, second, costs, strict=True)):
        here, there = a > 0, b > 0
        # Without its own check of the totals, which takes longer than the solver.
        optima[p], about = ot.emd2(
            a[here],
            b[there],
            np.ascontiguousarray(cost[here][:, there]),
            log=True,
            center_dual=False,
            check_marginals=False,
        )
        if about["warning"]:
            sizes = f"{int(here.sum())} x {int(there.sum())}"
            raise FedcoreError(f"transport between {sizes} atoms: {about['warning']}")
    return optima
