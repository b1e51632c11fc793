"""One iteration's progress is bounded by quantities that do not know the gradient under test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.regressor import (
    Iteration,
    Move,
    Regression,
    alternate,
    at_sine,
    client_heads,
    descend,
    deviations,
    random_regression,
    unit,
)
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS, ITERATIONS = 200, 40
FIXED, FRESH = (0.25, 0.5), (0.25, 0.5, 1.0)
"""The step sizes ``u = eta ||b*||^2`` on the same data in every iteration, and on new data."""


@dataclass(frozen=True)
class Case:
    """A problem, a start, and the seed of new data."""

    problem: Regression
    start: Array
    seed: int


@dataclass(frozen=True)
class Bounds:
    """What the next sine may be at most, and what ||bbar||^2 and ||moved||^2 are to be at least."""

    sine: float
    head: float
    moved: float


def draw(seed: int) -> Case:
    """8 clients with 200 rows in 20 dimensions, from sine 0.8."""
    random = np.random.default_rng(seed)
    problem = random_regression(random, 8, ROWS, 20)
    return Case(problem, at_sine(random, problem.truth, 0.8), seed)


def bounds(problem: Regression, a: Array, eta: float) -> Bounds:
    """The right sides, from the closed forms alone."""
    away = deviations(problem, a)
    delta, scale = problem.sine(a), problem.scale**2
    bbar = client_heads(problem, a).mean(axis=0)
    residual = (bbar @ bbar) * a - (problem.mean_head @ bbar) * problem.truth
    moved = a - 2 * eta * problem.covariances.mean(axis=0) @ residual
    noise = away.data * (1 + away.head) ** 2 * scale
    remaining = delta * abs(1 - 2 * eta * float(bbar @ bbar))
    return Bounds(
        sine=(remaining + 2 * eta * noise * delta) / float(np.linalg.norm(moved)),
        head=(1 - delta**2 - away.head) * scale,
        moved=1 - 4 * eta * noise - 4 * eta * (away.head**2 + away.head) * scale,
    )


def measure(cases: Iterable[Case], iteration: Iteration = alternate) -> Outcome:
    """Every iteration of every run against its bounds."""
    settings: dict[str, list[tuple[Move, Bounds]]] = {}
    for case in cases:
        random = np.random.default_rng([case.seed, 1])
        for label, sizes in (("same data", FIXED), ("new data", FRESH)):
            for u in sizes:
                seen = (
                    repeat(case.problem, ITERATIONS)
                    if label == "same data"
                    else (case.problem.resampled(random, ROWS) for _ in range(ITERATIONS))
                )
                eta = u / case.problem.scale**2
                settings.setdefault(f"{label}, u = {u:g}", []).extend(
                    (move, bounds(move.problem, unit(move.start), eta))
                    for move in descend(seen, case.start, eta, iteration)
                )
    every = [pair for pairs in settings.values() for pair in pairs]
    sines = [(move.problem.sine(move.result.a), bound.sine) for move, bound in every]
    heads = [(float(move.result.b @ move.result.b), bound.head) for move, bound in every]
    lengths = [(float(move.result.moved @ move.result.moved), bound.moved) for move, bound in every]
    return Outcome(
        measured=(
            Measured(
                "iterations whose sine is above the bound",
                sum(not after <= bound * (1 + 1e-9) + 1e-15 for after, bound in sines),
                "<=",
                0,
            ),
            Measured(
                "worst sine / bound",
                worst(after / bound for after, bound in sines if bound > 1e-11),
                "<=",
                1,
            ),
            Measured(
                "iterations whose ||bbar||^2 is below its bound",
                sum(not value >= bound for value, bound in heads),
                "<=",
                0,
            ),
            Measured(
                "iterations whose ||a+||^2 before scaling is below its bound",
                sum(not value >= bound for value, bound in lengths),
                "<=",
                0,
            ),
        ),
        samples=f"{len(every)} iterations in {len(settings)} settings",
        curves={
            label: [
                (move.problem.sine(move.result.a), bound.sine) for move, bound in pairs[:ITERATIONS]
            ]
            for label, pairs in settings.items()
        },
    )


def picture(outcome: Outcome) -> Figure:
    """The first runs on the same data, each iteration beside what its predecessor allows."""
    lines = []
    for u in FIXED:
        values = _first_run(outcome.curves[f"same data, u = {u:g}"])
        steps = range(1, len(values) + 1)
        lines.append(Line(f"measured, u = {u:g}", steps, [after for after, _ in values]))
        lines.append(Line(f"bound, u = {u:g}", steps, [bound for _, bound in values], bound=True))
    return trajectories(lines, "iteration", "sine of the angle to a*")


def _first_run(values: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Up to where the sine has come down to rounding, after which the next run begins."""
    ends = [n for n, (after, _) in enumerate(values) if after < 1e-12]
    return values[: ends[0] + 1] if ends else values


CHECK = Check(
    id="R2",
    title="progress of one iteration",
    claim="delta+ <= (delta |1 - 2 eta ||bbar||^2| + 2 eta eps~ (1 + eps')^2 delta ||b*||^2) / "
    "||a+||, where delta is the sine between a and a*, eps' = ||bbar - (a^T a*) b*|| / (delta "
    "||b*||) and eps~ = ||mean S_n - I||_2; further ||bbar||^2 >= (1 - delta^2 - eps') ||b*||^2 "
    "and ||a+||^2 >= 1 - 4 eta ||b*||^2 (eps~ (1 + eps')^2 + eps'^2 + eps').",
    source="RoLoRA, arXiv 2502.01755, appendix A (proof of the contraction lemma)",
    verdict="holds",
    assumptions="Clients share a* and b*, are weighted equally and solve for b exactly.",
    data="8 clients, 200 standard normal rows each, d = 20, delta0 = 0.8, 40 iterations; the same "
    "data in every iteration with u = eta ||b*||^2 in {.25, .5}, new data with u in {.25, .5, 1}; "
    "seeds 0 to 9",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=10,
    derivation="The right side is computed from closed forms only. With the gradient under test on "
    "it, as a bound on its own deviation from its mean, the inequality is the triangle inequality, "
    "which every gradient satisfies.",
    finding="Holds in every iteration, for step sizes up to u = 1 too: the loss of contraction at "
    "large steps (R3x) comes later in the proof.",
)
