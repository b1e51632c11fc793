"""Heads that cancel in the mean hide the common direction from every shared model."""

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
    Regression,
    alternate,
    at_sine,
    descend,
    random_regression,
)
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, SINE, ITERATIONS = 8, 0.7, 40


@dataclass(frozen=True)
class Case:
    """A problem and a start."""

    problem: Regression
    start: Array


def draw(seed: int) -> Case:
    """6 clients in 8 dimensions, each with another of the opposite head."""
    random = np.random.default_rng(seed)
    common = random_regression(random, 6, None, WIDTH)
    half = random.standard_normal((3, WIDTH))
    problem = Regression(common.truth, np.concatenate([half, -half]), common.covariances)
    return Case(problem, at_sine(random, problem.truth, SINE))


def measure(cases: Iterable[Case], iteration: Iteration = alternate) -> Outcome:
    """Gradient and motion of the federation; the first client alone as the control."""
    gradients: list[float] = []
    motions: list[float] = []
    alone: list[float] = []
    paths: dict[str, list[float]] = {}
    for case in cases:
        problem = case.problem
        eta = 1 / (2 * _first(problem).scale ** 2)
        runs = {"6 clients": problem, "the first client alone": _first(problem)}
        sines = {name: [SINE] for name in runs}
        for name, one in runs.items():
            for move in descend(repeat(one, ITERATIONS), case.start, eta, iteration):
                sines[name].append(one.sine(move.result.a))
                if one is problem:
                    gradients.append(float(np.linalg.norm(move.start - move.result.moved)) / eta)
                    motions.append(float(np.abs(move.result.a - case.start).max()))
        alone.append(sines["the first client alone"][-1])
        paths = paths or sines
    return Outcome(
        measured=(
            Measured("largest ||grad_a||", worst(gradients), "<=", 1e-14),
            Measured("largest motion of an entry of a", worst(motions), "<=", 1e-14),
            Measured("sine that one client reaches alone", worst(alone), "<", 1e-2),
        ),
        samples=f"{len(gradients)} iterations",
        curves=paths,
    )


def _first(problem: Regression) -> Regression:
    return Regression(problem.truth, problem.heads[:1], problem.covariances[:1])


def picture(outcome: Outcome) -> Figure:
    """The first problem's sines."""
    lines = [Line(name, range(len(path)), path) for name, path in outcome.curves.items()]
    return trajectories(lines, "iteration", "sine of the angle to a*", marks={"start": SINE})


CHECK = Check(
    id="R10",
    title="blind spot",
    claim="If the clients' heads b_n* have mean zero, the averaged gradient of a vanishes in every "
    "iteration and a never moves, although every client has data that determine a*.",
    source="ours",
    verdict="holds",
    assumptions="S_n = I, equal weights, one (a, b) for all clients.",
    data="6 clients in pairs of opposite normal heads, d = 8, delta0 = .7, 40 iterations; seed 0",
    draw=draw,
    measure=measure,
    picture=picture,
    derivation="bbar = cos mean_n b_n* = 0, and the gradient is linear in bbar.",
    finding="A zero gradient is not convergence here: the loss is that of no adapter at all, while "
    "one client alone finds a*. Methods with personal heads or cores do not have this blind spot.",
)
