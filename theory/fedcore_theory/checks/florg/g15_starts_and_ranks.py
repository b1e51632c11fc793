"""A = 0 is stationary, and rank that A has lost does not come back under gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.gram_rounds import gram_step
from fedcore_theory.models.gram_training import (
    GramProblem,
    Optimiser,
    Server,
    Stepper,
    gram_problem,
    step,
    train,
)
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANK, LOST = 4, 2


@dataclass(frozen=True)
class Starts:
    """A problem whose start has rank 2 of 4, and factors of the usual start: ``(16, 4, 1024)``."""

    problem: GramProblem
    fresh: Array


def draw(seed: int) -> Starts:
    """5 clients, k = 16, r = 4; fresh factors are .01 N(0, 1)."""
    random = np.random.default_rng(seed)
    problem = gram_problem(random, rank=RANK)
    short = 0.3 * random.standard_normal((RANK, LOST)) @ random.standard_normal((LOST, 16))
    return Starts(replace(problem, start=short), 0.01 * random.standard_normal((16, RANK, 1024)))


def shipped(method: str) -> Server:
    """A server by its name."""
    return lambda case: gram_step(method, case)


def measure(
    cases: Iterable[Starts],
    servers: Callable[[str], Server] = shipped,
    stepper: Stepper = step,
    gradient: Callable[[GramProblem, Array], Array] = GramProblem.gradient,
) -> Outcome:
    """Lost singular values round by round, of three servers under SGD and one under AdamW."""
    sgd, adam = Optimiser(rate=0.02), Optimiser("adamw", 0.01)
    settings: Mapping[str, tuple[str, Optimiser]] = {
        "sketched, SGD": ("florg.sketched", sgd),
        "avg_a, SGD": ("florg.avg_a", sgd),
        "truncated, SGD": ("florg.truncated", sgd),
        "avg_a, AdamW": ("florg.avg_a", adam),
    }
    at_zero, sizes = [], []
    lost: dict[str, list[Array]] = {name: [] for name in settings}
    alone: list[float] = []
    for case in cases:
        problem = case.problem
        zero = np.zeros((problem.clients, *problem.start.shape))
        at_zero.append(float(np.abs(gradient(problem, zero)).max()))
        grams = case.fresh @ case.fresh.swapaxes(1, 2)
        sizes.append(float(np.linalg.norm(4 * grams, axis=(1, 2)).mean()))
        for name, (method, optimiser) in settings.items():
            run = train(problem, servers(method), optimiser, rounds=20, stepper=stepper)
            lost[name].append(_lost(run.factors))
        one = replace(problem, targets=problem.targets[:1])
        run = train(one, servers("florg.truncated"), sgd, rounds=20, stepper=stepper)
        alone.append(float(_lost(run.factors).max()))
    stays = [
        *alone,
        *(path.max() for name in ("sketched, SGD", "avg_a, SGD") for path in lost[name]),
    ]
    return Outcome(
        measured=(
            Measured(
                "lost singular value under SGD, largest", worst(map(float, stays)), "<=", 1e-9
            ),
            Measured("gradient at A = 0", worst(at_zero), "<=", 0),
            Measured("||4 A^T A||_F of .01 N(0, 1), least mean", least(sizes), ">=", 0.80),
            Measured("||4 A^T A||_F of .01 N(0, 1), largest mean", worst(sizes), "<=", 0.86),
            *(
                Measured(
                    f"lost singular value in the end, {name}",
                    least(float(path[-1]) for path in lost[name]),
                    ">=",
                    1e-2,
                )
                for name in ("truncated, SGD", "avg_a, AdamW")
            ),
        ),
        samples=f"{len(sizes)} problems, 20 rounds of 5 steps",
        curves={name: paths[0] for name, paths in lost.items()},
    )


def _lost(factors: Array) -> Array:
    """The third singular value of each round's factor over the first."""
    values = np.linalg.svd(factors, compute_uv=False)
    return np.asarray(values[:, LOST] / values[:, 0])


def picture(outcome: Outcome) -> Figure:
    """The first problem's lost singular value, round by round."""
    lines = [Line(name, np.arange(len(f)), f) for name, f in outcome.curves.items()]
    return trajectories(lines, "round", "σ₃ / σ₁ of A, which began with rank 2")


CHECK = Check(
    id="G15",
    title="starts and ranks",
    claim="A = 0 has gradient 0. Directions u with u^T A = 0 keep it under gradient descent, and "
    "so under `sketched` and `avg_a`: rank that is lost stays lost.",
    source="ours",
    verdict="holds",
    assumptions="Plain gradient steps; AdamW treats entries one by one and does not keep u^T A = "
    "0.",
    data="The quadratics of G9 with r = 4, started from a factor of rank 2, 20 rounds of 5 "
    "steps; 16 factors 4 x 1024 of .01 N(0, 1) for their size; seeds 0 to 2",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=3,
    derivation="grad F(A) = A (H + H^T), so u^T grad = 0. `sketched` returns K^{-1/2} A_prev Q, "
    "whose rank is at most that of A_prev. `truncated` is an exception: clients' row spaces "
    "differ, their mean Gram has rank up to 2 N, and its best rank-4 factor has rank 4 again.",
    finding="A start must not be zero, and is then no zero update: about .83 at width 1024 for "
    "the usual size, which is why the package subtracts it. Several clients restore lost rank "
    "under `truncated`; a single one does not.",
)
