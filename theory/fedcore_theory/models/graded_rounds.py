"""Rounds whose previous factor has singular values over many decades, and errors in the weakest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore_theory.check import worst
from fedcore_theory.models.gram_rounds import GramRound, orthogonal
from fedcore_theory.rounds import Array

CONDITIONS = (1e1, 1e2, 1e3, 1e4)

Graded = Mapping[float, tuple[GramRound, ...]]
"""Condition of ``A_prev`` to the rounds that start from it."""

Table = Mapping[str, tuple[tuple[float, float], ...]]
"""Rule to the lowest and the highest error known for each condition."""


def graded_round(
    random: np.random.Generator,
    condition: float,
    deviation: float,
    clients: int = 20,
    rank: int = 8,
    width: int = 768,
) -> GramRound:
    """Singular values from 1 to 1 / condition; clients deviate by a share of the smallest one."""
    values = np.geomspace(1, 1 / condition, rank)
    basis = np.linalg.qr(random.standard_normal((width, rank)))[0].T
    previous = orthogonal(random, rank) @ (values[:, None] * basis)
    noise = deviation * values[-1] * random.standard_normal((clients, rank, width))
    return GramRound(previous, previous + noise, np.full(clients, 1 / clients))


def graded_rounds(seed: int, conditions: Iterable[float] = CONDITIONS) -> Graded:
    """Deviations of .1 and of .001 for each condition."""
    random = np.random.default_rng(seed)
    return {
        condition: tuple(graded_round(random, condition, deviation) for deviation in (0.1, 0.001))
        for condition in conditions
    }


def weakest_error(found: Array, exact: Array) -> float:
    """``||(found - exact) v|| / sigma_r``, v the weakest right singular vector of ``exact``."""
    _, values, right = np.linalg.svd(exact, full_matrices=False)
    return float(np.linalg.norm((found - exact) @ right[-1]) / values[-1])


def polar_factor(matrix: Array) -> Array:
    """``U V^T`` of ``U S V^T``, in the precision of ``matrix``."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(left @ right)


def best_gram(case: GramRound) -> Array:
    """``truncated`` by its definition: the SVD of F in fp64, aligned with ``A_prev``."""
    _, values, right = np.linalg.svd(case.stack, full_matrices=False)
    return aligned(values[: case.rank, None] * right[: case.rank], case.previous)


def sketched_gram(case: GramRound) -> Array:
    """``sketched`` by its definition, ``polar(A_prev F^T) F``, in fp64.

    Through ``A_prev = T V``: the condition of F, not its square.
    """
    left, values, basis = np.linalg.svd(case.previous, full_matrices=False)
    inner, scale, outer = np.linalg.svd(basis @ case.stack.T, full_matrices=False)
    turn = polar_factor((left * values) @ (inner * scale))
    return np.asarray(turn @ outer @ case.stack)


def aligned(factor: NDArray[np.floating[Any]], previous: Array) -> Array:
    """``O factor`` nearest to ``previous``, in fp64."""
    wide = factor.astype(np.float64)
    return polar_factor(previous @ wide.T) @ wide


def errors(
    cases: Iterable[Graded],
    rules: Mapping[str, Callable[[GramRound], Array]],
    exact: Mapping[str, Callable[[GramRound], Array]],
) -> dict[str, list[float]]:
    """Rule to its largest error over all cases, condition by condition."""
    by_rule: dict[str, dict[float, list[float]]] = {name: {} for name in rules}
    for case in cases:
        for condition, rounds in case.items():
            for one in rounds:
                truth = {name: rule(one) for name, rule in exact.items()}
                for name, rule in rules.items():
                    wanted = truth[next(key for key in truth if name.startswith(key))]
                    by_rule[name].setdefault(condition, []).append(weakest_error(rule(one), wanted))
    return {name: [worst(list_) for list_ in by.values()] for name, by in by_rule.items()}


def factor_off(found: float, entry: tuple[float, float]) -> float:
    """How many times ``found`` is above or below what a table says; 1 inside of it."""
    low, high = entry
    return max(1.0, low / found, found / high) if np.isfinite(found) and found > 0 else np.inf
