"""When two coefficient vectors are enough to lose nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.combinations import (
    Coefficients,
    nearest,
    squared_error,
    squared_size,
)
from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.models.families import Shape, indep, weighted
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Solve = Callable[[ClientFactors], Coefficients]

GENERIC = "rank M = r"
"""The case that is not exact: one column space, but generic cores."""


def draw(seed: int) -> dict[str, ClientFactors]:
    """Five exact cases and one that is not, of 4 clients, 20 x 25, rank 3."""
    random = np.random.default_rng(seed)
    base = weighted(random, indep(random, Shape(4, 20, 25, 3)))
    A, B, w = base.A, base.B, base.weights
    scales = np.array([1.0, 2.0, -1.0, 0.5])[:, None, None]
    gauges: Array = random.standard_normal((4, 3, 3))

    def like_first(values: Array) -> Array:
        return np.repeat(values[:1], len(values), axis=0)

    return {
        "one client": ClientFactors(A[:1], B[:1], np.ones(1)),
        "equal clients": ClientFactors(like_first(A), like_first(B), w),
        "common A": ClientFactors(like_first(A), B, w),
        "A_n = c_n A": ClientFactors(scales * like_first(A), B, w),
        "equal products": ClientFactors(
            np.asarray(np.linalg.solve(gauges, like_first(A))), like_first(B) @ gauges, w
        ),
        GENERIC: ClientFactors(A, like_first(B) @ gauges, w),
    }


def measure(cases: Iterable[Mapping[str, ClientFactors]], solve: Solve = nearest) -> Outcome:
    """Relative f of FedAvg's means and of the fit, and whether equal clients keep their weights."""
    exact: list[float] = []
    generic: list[float] = []
    moved: list[float] = []
    apart: list[float] = []
    heights: dict[str, dict[str, float]] = {}
    rounds = 0
    for case in cases:
        rounds += 1
        for name, clients in case.items():
            size, point = squared_size(clients), solve(clients)
            means = Coefficients(clients.weights, clients.weights)
            share = squared_error(clients, point) / size
            (generic if name == GENERIC else exact).append(share)
            if name == "equal clients":
                moved += [float(np.abs(side - clients.weights).max()) for side in point]
            uploads = {"A": clients.A, "B": clients.B}
            product = server_round("flora_na", uploads, clients.weights).product
            apart.append(float(np.square(clients.mean_product - product).sum()) / size - share)
            shares = {"FedAvg": squared_error(clients, means) / size, "nearest": share}
            heights.setdefault(name, shares)
    return Outcome(
        measured=(
            Measured("f / ||M||^2, cases said to be exact", worst(exact), "<=", 1e-12),
            Measured("equal clients: |p - w|, |q - w|", worst(moved), "<=", 1e-12),
            Measured("f / ||M||^2, rank M = r with generic cores", least(generic), ">", 1e-6),
            Measured(
                "the method's round off its coefficients", worst(map(abs, apart)), "<=", 1e-12
            ),
        ),
        samples=f"{rounds} rounds of each case",
        curves=heights,
    )


def picture(outcome: Outcome) -> Figure:
    """What FedAvg loses in the first round of each case, and what is left of it."""
    return bars(outcome.curves, "f / ||M||^2", log_y=True)


CHECK = Check(
    id="N5",
    title="exact cases, and one that is not",
    claim="The least f is 0 for one client, equal clients (where p = q = w), a factor common up to "
    "a scale per client, and equal products in different gauges. That M has rank r is not enough.",
    source="ours; the problem is FLoRA-NA's, arXiv 2509.26399",
    verdict="holds",
    assumptions="Equal ranks.",
    data="4 clients, 20 x 25, rank 3, Gaussian factors, Dirichlet(1) weights; c = 1, 2, -1, 1/2; "
    "Gaussian gauges; seeds 0 to 9",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=10,
    derivation="Write each as M = (sum p_n B_n) (sum q_n A_n). For A_n = c_n A: p_n = w_n c_n, q = "
    "e_1 / c_1. For equal products: p = q = e_1.",
    finding="In all of them the curvature R or T is singular: half-steps have to be corrections by "
    "a pseudo-inverse, so that directions that change nothing keep their start.",
)
