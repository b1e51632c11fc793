"""After one local step the clients are aligned already, and Procrustes has almost nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import orders
from fedcore_theory.models.gram_rounds import GramRound, gram_step
from fedcore_theory.models.gram_training import GramProblem, gram_problem
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = 0.01 / 2.0 ** np.arange(4)
_SYMMETRY = 1e-14
_MARGIN = 0.1


@dataclass(frozen=True)
class Start:
    """A problem, and one direction per client that is not a gradient: ``(N, r, k)``."""

    problem: GramProblem
    generic: Array


def draw(seed: int) -> Start:
    """6 clients, k = 20, r = 3, a start of .3 N(0, 1)."""
    random = np.random.default_rng(seed)
    problem = gram_problem(random, clients=6, width=20, rank=3)
    return Start(problem, random.standard_normal((6, 3, 20)))


def aligned(case: GramRound) -> Array:
    """``florg.truncated``."""
    return gram_step("florg.truncated", case)


def measure(
    cases: Iterable[Start],
    server: Callable[[GramRound], Array] = aligned,
    gradient: Callable[[GramProblem, Array], Array] = GramProblem.gradient,
) -> Outcome:
    """How symmetric ``A_n A_prev^T`` is, and how ``||A - Abar||`` shrinks with the rate."""
    asymmetry: list[float] = []
    distances: dict[str, list[Array]] = {"1 gradient step": [], "5 steps": [], "generic": []}
    for case in cases:
        problem = case.problem
        previous = np.broadcast_to(problem.start, case.generic.shape)
        weights = np.full(problem.clients, 1 / problem.clients)
        base = GramRound(problem.start, previous, weights)
        by_rate: dict[str, list[float]] = {name: [] for name in distances}
        for rate in RATES:
            once = previous - rate * gradient(problem, previous)
            products = once @ problem.start.T
            scale = float(np.abs(products).max())
            asymmetry.append(float(np.abs(products - products.swapaxes(1, 2)).max()) / scale)
            often = previous
            for _ in range(5):
                often = often - rate * gradient(problem, often)
            for name, A in zip(by_rate, (once, often, previous + rate * case.generic), strict=True):
                sent = replace(base, A=A)
                by_rate[name].append(float(np.linalg.norm(server(sent) - sent.mean)))
        for name, values in by_rate.items():
            distances[name].append(np.array(values))
    slopes = {name: [_slope(values) for values in curves] for name, curves in distances.items()}
    worst_slope = {
        name: worst(abs(slope - order) for slope in slopes[name])
        for name, order in (("1 gradient step", 2), ("generic", 1))
    }
    return Outcome(
        measured=(
            Measured("asymmetry of A_n A_prev^T after one step", worst(asymmetry), "<=", _SYMMETRY),
            Measured(
                "order of ||A - Abar|| off 2, one step",
                worst_slope["1 gradient step"],
                "<=",
                _MARGIN,
            ),
            Measured("order of ||A - Abar||, five steps", least(slopes["5 steps"]), ">=", 1.5),
            Measured("order of ||A - Abar|| off 1, generic", worst_slope["generic"], "<=", _MARGIN),
        ),
        samples=f"{len(slopes['generic'])} problems, rates .01 halved three times",
        curves={name: curves[0] for name, curves in distances.items()},
    )


def _slope(values: Array) -> float:
    return float(np.polyfit(np.log(RATES), np.log(values), 1)[0])


def picture(outcome: Outcome) -> Figure:
    """The first problem's distances over the rate."""
    series = {name: (RATES, values) for name, values in outcome.curves.items()}
    return orders(series, "learning rate, or size of the deviation", "‖A − Σ wₙ Aₙ‖")


CHECK = Check(
    id="G10",
    title="one local step is aligned",
    claim="After one gradient step from A_prev, A_n A_prev^T = A_prev A_prev^T - eta A_prev (H_n "
    "+ H_n^T) A_prev^T is symmetric: no rotation brings A_n nearer to A_prev. FLoRG's A and the "
    "mean of the A_n then differ by O(eta^2); for deviations that are not gradients, by O(eta).",
    source="ours",
    verdict="holds",
    assumptions="eta small enough for A_n A_prev^T to be positive definite; equal start of all "
    "clients.",
    data="The quadratics of G9 with k = 20, r = 3, 6 clients, start .3 N(0, 1); one and five "
    "steps at rates .01, .005, .0025, .00125; generic: A_prev + eta N(0, 1); seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    derivation="The polar factor of a symmetric positive definite matrix is I, so O = I for "
    "every client; Q - Abar^T Abar is the covariance of the A_n, of order eta^2.",
    finding="With few local steps, averaging A and averaging Grams start out alike. What "
    "Procrustes adds has to come from many local steps or from optimisers other than "
    "gradient descent.",
)
