"""In B alone the loss is smooth with a known constant; in A and B together it is not smooth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gradient = Callable[[Array, Array, Array, float], tuple[Array, Array]]
"""``A``, ``B``, the target and s to the gradients of A and B."""

_SCALING = 4.0
_CURVATURE = 2.0
_PAIRS = 200
_SCALES = np.array([10.0, 100.0, 1000.0])


@dataclass(frozen=True)
class Layer:
    """A target ``(d_out, d_in)``, factors, and pairs of B, ``(S, 2, d_out, r)``."""

    target: Array
    A: Array
    B: Array
    pairs: Array


def draw(seed: int) -> Layer:
    """8 x 10 at rank 3, all Gaussian."""
    random = np.random.default_rng(seed)
    return Layer(
        random.standard_normal((8, 10)),
        random.standard_normal((3, 10)),
        random.standard_normal((8, 3)),
        random.standard_normal((_PAIRS, 2, 8, 3)),
    )


def gradients(A: Array, B: Array, target: Array, s: float) -> tuple[Array, Array]:
    """Of ``L/2 ||s B A - target||_F^2``."""
    outer = _CURVATURE * (s * B @ A - target)
    return s * B.T @ outer, s * outer @ A.T


def constant(A: Array, s: float) -> float:
    """``s^2 L ||A||_2^2``."""
    return float(s**2 * _CURVATURE * np.linalg.norm(A, 2) ** 2)


def measure(
    cases: Iterable[Layer],
    gradients: Gradient = gradients,
    constant: Callable[[Array, float], float] = constant,
) -> Outcome:
    """Changes of the gradient over changes of the factors."""
    tops, pairs, growth, curves = [], [], [], []
    for case in cases:
        bound = constant(case.A, _SCALING)

        def in_B(B: Array, case: Layer = case) -> Array:
            return gradients(case.A, B, case.target, _SCALING)[1]

        random = [
            float(np.linalg.norm(in_B(one) - in_B(two)) / np.linalg.norm(one - two))
            for one, two in case.pairs
        ]
        pairs.append(worst(random) / bound)
        steepest = np.outer(np.ones(8), np.linalg.svd(case.A).U[:, 0])
        change = np.linalg.norm(in_B(case.B + steepest) - in_B(case.B))
        tops.append(float(change / np.linalg.norm(steepest) / bound))
        ratios = np.array([_joint(case, scale, gradients) for scale in _SCALES])
        growth += list(ratios[1:] / ratios[:-1])
        curves.append(ratios)
    return Outcome(
        measured=(
            Measured("largest ratio to the constant, random pairs", worst(pairs), "<=", 1 + 1e-12),
            Measured(
                "distance from equality along the top direction",
                worst(abs(top - 1) for top in tops),
                "<=",
                1e-12,
            ),
            Measured(
                "A and B jointly: growth per tenfold factors, distance from 100",
                worst(abs(one - 100) for one in growth),
                "<=",
                1,
            ),
        ),
        samples=f"{_PAIRS} pairs and one steepest direction of each of {len(tops)} layers",
        curves={"joint": np.mean(curves, axis=0), "in B": _SCALES**0},
    )


def _joint(case: Layer, scale: float, gradients: Gradient) -> float:
    """Change of both gradients over a change of both factors, at factors ``scale`` times as large.

    Relative to the constant in B at scale 1.
    """
    A, B = scale * case.A, scale * case.B
    # A fixed direction: the curvature at the point, not the size of the step, is what grows.
    step_A, step_B = 1e-2 * case.A[:, ::-1], 1e-2 * case.B[::-1]
    here, there = (
        gradients(A, B, case.target, _SCALING),
        gradients(A + step_A, B + step_B, case.target, _SCALING),
    )
    change = np.hypot(np.linalg.norm(there[0] - here[0]), np.linalg.norm(there[1] - here[1]))
    moved = np.hypot(np.linalg.norm(step_A), np.linalg.norm(step_B))
    return float(change / moved / constant(case.A, _SCALING))


def picture(outcome: Outcome) -> Figure:
    """The joint curvature against the scale of the factors."""
    return trajectories(
        [
            Line("A and B trained", _SCALES, outcome.curves["joint"]),
            Line("B trained: the constant, whatever B is", _SCALES, outcome.curves["in B"], True),
        ],
        "scale of the trained factors",
        "gradient change / (s² L ‖A‖² change)",
        log_x=True,
    )


CHECK = Check(
    id="A3",
    title="smoothness in B and in both factors",
    claim="If the loss is L-smooth in W, it is smooth in B with constant s^2 L ||A||_2^2, and no "
    "smaller one will do; in (A, B) jointly no constant does.",
    source="ours; FFA-LoRA, arXiv 2403.12313, argues from such a constant, but its text was not "
    "available to us",
    verdict="holds",
    assumptions="W = W0 + s B A with A frozen; equality for a loss with curvature L in all "
    "directions.",
    data="L/2 ||s B A - target||^2, 8 x 10, rank 3, s = 4, L = 2, Gaussian; 200 pairs of B; the "
    "factors scaled by 10, 100, 1000 for the joint gradient; seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    finding="One step size serves all of FFA-LoRA's training. With both factors trained the "
    "curvature grows with the square of the factors, and a bound has to bound them first.",
)
