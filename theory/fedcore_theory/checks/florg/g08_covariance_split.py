"""What the mean of A misses of the mean Gram: the covariance of the clients' A."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import orders
from fedcore_theory.models.gram_rounds import (
    GramRound,
    GramStep,
    gram_of,
    mean_factor,
    rounds_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEVIATIONS = (0.01, 0.03, 0.1, 0.3)


def draw(seed: int) -> Sequence[GramRound]:
    """The default round at every deviation."""
    return rounds_of(seed, DEVIATIONS)


def measure(cases: Iterable[Sequence[GramRound]], step: GramStep = mean_factor) -> Outcome:
    """The identity entry by entry, and its order in the deviation."""
    gaps, slopes = [], []
    curves: list[list[float]] = []
    for rounds in cases:
        shares = []
        for case in rounds:
            A = step(case)
            away = case.A - A
            covariance = np.einsum("n,nri,nrj->ij", case.weights, away, away)
            missed = case.gram - gram_of(A)
            size = float(np.linalg.norm(case.gram))
            gaps.append(float(np.linalg.norm(missed - covariance)) / size)
            shares.append(float(np.linalg.norm(missed)) / size)
        slope = np.polyfit(np.log(DEVIATIONS), np.log(shares), 1)[0]
        slopes.append(abs(float(slope) - 2))
        curves.append(shares)
    return Outcome(
        measured=(
            Measured("Q - A^T A - sum w dA^T dA, relative to Q", worst(gaps), "<=", 1e-13),
            Measured("slope in the deviation, less 2", worst(slopes), "<=", 0.05),
        ),
        samples=f"{len(gaps)} rounds, {len(DEVIATIONS)} deviations",
        curves={"shares": curves},
    )


def picture(outcome: Outcome) -> Figure:
    """The share of Q that the mean of A misses, in the median round."""
    shares = np.median(np.array(outcome.curves["shares"]), axis=0)
    return orders(
        {"mean of A": (DEVIATIONS, shares)},
        "deviation of the clients' entries",
        "missing share of Q (Frobenius norm)",
    )


CHECK = Check(
    id="G8",
    title="covariance split of the Gram",
    claim="Q = Abar^T Abar + sum w_n (A_n - Abar)^T (A_n - Abar).",
    source="ours",
    verdict="holds",
    assumptions="Weights sum to 1.",
    data="6 clients, r = 4, k = 60, A_prev standard normal, A_n = A_prev + N(0,1) times .01, .03, "
    ".1 and .3, one noise and Dirichlet(1) weights; seeds 0 to 19",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=20,
    finding="Aggregating Grams adds a positive term of second order in the local step to the mean "
    "of A (`florg.avg_a`), and nothing else.",
)
