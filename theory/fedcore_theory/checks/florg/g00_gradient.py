"""The gradient of a Gram adapter, against differences of its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.factors import relative
from fedcore_theory.models.gram_quadratic import (
    GramQuadratic,
    gram_gradient,
    gram_gradient_from_batch,
    orthonormal_columns,
)
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT, IN, WIDTH, RANK, SCALE = 7, 5, 5, 3, 4.0

STEPS = np.geomspace(1e-6, 1.0, 25)
"""Of the differences that the picture shows; the check takes the largest."""

Gradient = Callable[[GramQuadratic, Array], Array]
BatchGradient = Callable[[GramQuadratic, Array, Array, Array], Array]


@dataclass(frozen=True)
class Case:
    """A loss, the factor ``A (r, k)`` to differentiate at, and inputs ``(b, d_in)``."""

    problem: GramQuadratic
    A: Array
    inputs: Array


def draw(seed: int) -> Case:
    """Random frames, target, factor and orthonormal inputs of a 7 x 5 layer."""
    random = np.random.default_rng(seed)
    problem = GramQuadratic(
        orthonormal_columns(random, OUT, WIDTH),
        orthonormal_columns(random, IN, WIDTH).T,
        random.standard_normal((OUT, IN)),
        SCALE,
    )
    inputs = orthonormal_columns(random, 2 * IN, IN)
    return Case(problem, 0.5 * random.standard_normal((RANK, WIDTH)), inputs)


def differences(problem: GramQuadratic, A: Array, step: float) -> Array:
    """Five-point central differences, exact for a polynomial of degree four such as this loss."""
    gradient = np.zeros_like(A)
    for place in np.ndindex(A.shape):
        moved = np.zeros_like(A)
        moved[place] = step
        near = problem.loss(A + moved) - problem.loss(A - moved)
        far = problem.loss(A + 2 * moved) - problem.loss(A - 2 * moved)
        gradient[place] = (8 * near - far) / (12 * step)
    return gradient


def measure(
    cases: Iterable[Case],
    gradient: Gradient = gram_gradient,
    batch_gradient: BatchGradient = gram_gradient_from_batch,
) -> Outcome:
    """Both forms against the differences, on every case."""
    dense: list[float] = []
    batch: list[float] = []
    by_step: list[float] = []
    for case in cases:
        exact = differences(case.problem, case.A, STEPS[-1])
        analytic = gradient(case.problem, case.A)
        # With orthonormal columns x, the gradient g = x G^T of the outputs gives g^T x = G.
        outputs = case.inputs @ case.problem.residual(case.A).T
        dense.append(relative(analytic, exact))
        batch.append(relative(batch_gradient(case.problem, case.A, case.inputs, outputs), exact))
        if not by_step:
            by_step = [relative(differences(case.problem, case.A, h), analytic) for h in STEPS]
    return Outcome(
        measured=(
            Measured("relative error of s A (H + H^T)", worst(dense), "<=", 1e-8),
            Measured("relative error of s (V_A^T X + X_A^T V)", worst(batch), "<=", 1e-8),
        ),
        samples=f"{len(dense)} layers, all {RANK * WIDTH} entries of A",
        curves={"steps": STEPS, "errors": by_step},
    )


def picture(outcome: Outcome) -> Figure:
    """The two estimates meet as rounding in the differences fades."""
    steps = outcome.curves["steps"]
    return trajectories(
        [
            Line("gradient against differences", steps, outcome.curves["errors"]),
            Line("allowed", steps, np.full(len(steps), 1e-8), bound=True),
        ],
        "step of the differences (entries of A)",
        "relative distance",
        log_x=True,
    )


CHECK = Check(
    id="G0",
    title="gradient of a Gram adapter",
    claim="With W = W0 + s left A^T A right and G the gradient in W, the gradient in A is "
    "s A (H + H^T), H = left^T G right^T; from inputs X and output gradients V between the frames "
    "it is s (V_A^T X + X_A^T V), X_A = X A^T, V_A = V A^T.",
    source="ours",
    verdict="holds",
    assumptions="Frames are constants of the differentiation.",
    data="7 x 5 layers, k = 5, r = 3, s = 4, random orthonormal frames, "
    "F = 1/2 ||s left A^T A right - C||^2; seeds 0 to 19",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=20,
    derivation="F is a polynomial of degree four in A, for which five-point differences are exact "
    "at any step: only rounding is left, and tolerances need not allow for truncation.",
    finding="Both forms are the gradient to rounding; the second costs O(b r k) and forms no "
    "k x k matrix.",
)
