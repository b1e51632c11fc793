"""The printed step size is twice too large for the contraction lemma."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.regressor import Iteration, alternate, descend, next_tangent
from fedcore_theory.models.regressor_starts import ITERATIONS, Case, draw
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRINTED, UNSTABLE = 1.0, 1.05
"""``eta ||b*||^2`` at the printed ``eta = 1/L_max^2``, and a little above it."""

STEPS = 2_000
SINES = (0.1, 0.5, 0.9)

Recursion = Callable[[Array, float], Array]
"""The tangent and u to the next tangent, for infinitely many rows."""


def measure(
    cases: Iterable[Case], iteration: Iteration = alternate, recursion: Recursion = next_tangent
) -> Outcome:
    """Iterations at u = 1 against the lemma, and where its population version begins to fail."""
    broken: dict[float, list[bool]] = {}
    for case in cases:
        for sine, (problem, start) in case.starts.items():
            eta = PRINTED / problem.scale**2
            rate = np.sqrt(1 - PRINTED * (1 - sine**2))
            broken.setdefault(sine, []).extend(
                move.problem.sine(move.result.a) > rate * move.problem.sine(move.start)
                for move in descend(repeat(problem, ITERATIONS), start, eta, iteration)
            )
    shares = {sine: float(np.mean(failures)) for sine, failures in broken.items()}
    thresholds = {sine: _threshold(sine, recursion) for sine in SINES}
    run = _sines(0.6, PRINTED, recursion)
    return Outcome(
        measured=(
            Measured(
                "least share of iterations above the bound", least(shares.values()), ">=", 0.9
            ),
            Measured(
                "largest safe u, distance from 1 - (1 - delta0^2)/4",
                worst(abs(threshold - _formula(sine)) for sine, threshold in thresholds.items()),
                "<=",
                1e-3,
            ),
            Measured(
                f"delta_t sqrt(8 t) at u = 1, t = {STEPS:,}",
                float(run[-1] * np.sqrt(8 * STEPS)),
                "within",
                (0.99, 1.01),
            ),
            Measured(
                f"delta_t at u = {UNSTABLE:g}, t = {STEPS:,}",
                float(_sines(0.6, UNSTABLE, recursion)[-1]),
                ">",
                0.1,
            ),
        ),
        samples=f"{sum(map(len, broken.values()))} iterations",
        curves={"sines": {u: _sines(0.6, u, recursion) for u in (0.5, 0.75, PRINTED, UNSTABLE)}},
    )


def _formula(sine: float) -> float:
    return 1 - (1 - sine**2) / 4


def _threshold(sine: float, recursion: Recursion) -> float:
    """The largest u on a grid for which every sine up to ``sine`` contracts as the lemma says."""
    before = np.linspace(1e-6, sine, 400)
    safe = 0.0
    for u in np.arange(1, 10_001) / 1e4:
        after = np.sin(np.arctan(np.abs(recursion(np.tan(np.arcsin(before)), u))))
        if not (after <= before * np.sqrt(1 - u * (1 - sine**2)) * (1 + 1e-9)).all():
            break
        safe = float(u)
    return safe


def _sines(sine: float, u: float, recursion: Recursion) -> Array:
    """``(STEPS + 1,)`` the sine from the start on."""
    tangents = [np.tan(np.arcsin(sine))]
    for _ in range(STEPS):
        tangents.append(recursion(tangents[-1], u))
    return np.sin(np.arctan(np.abs(tangents)))


def picture(outcome: Outcome) -> Figure:
    """Four step sizes from the same start, and the law of the printed one."""
    names = {PRINTED: " (as printed)", 0.5: " (half of it)"}
    # Evenly spread on the logarithmic axis, so that marks are.
    steps = np.unique(np.geomspace(1, STEPS, 60).astype(int))
    lines = []
    for u, path in outcome.curves["sines"].items():
        shown = steps[path[steps] > 1e-14]
        lines.append(Line(f"u = {u:g}{names.get(u, '')}", shown, path[shown]))
    rate = np.sqrt(1 - PRINTED * (1 - 0.6**2))
    shown = np.arange(1, 60)
    lines += [
        Line("lemma at u = 1", shown, 0.6 * rate**shown, bound=True),
        Line("1/sqrt(8 t)", steps, 1 / np.sqrt(8 * steps), bound=True),
    ]
    return trajectories(lines, "iteration t", "sine of the angle to a*", log_x=True)


CHECK = Check(
    id="R3x",
    title="the printed step size",
    claim="The contraction of R3 for every eta <= 1/L_max^2, as printed.",
    source="RoLoRA, arXiv 2502.01755, contraction lemma",
    verdict="erratum",
    assumptions="Those of the lemma, eps' and eps~ in bounds; eta = 1/||b*||^2, L_max = ||b*||.",
    data="R3's problems at u = eta ||b*||^2 = 1, 60 iterations each, seeds 0 to 4; for infinitely "
    "many rows the exact recursion of the tangent (R4), a grid of 400 sines and steps of 1e-4 in "
    "u, 2,000 iterations from sine 0.6",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    derivation="The proof replaces |1 - 2 eta ||bbar||^2| by 1 - 2 eta ||bbar||^2, which needs "
    "2 eta ||bbar||^2 <= 1. For infinitely many rows delta+/delta = |1 - 2u c^2| / sqrt(1 + 4 u^2 "
    "c^2 s^2) with c, s the cosine and sine; its worst case within the lemma is s -> 0.",
    finding="At the printed limit nearly every iteration is above the bound. The lemma holds for "
    "infinitely many rows up to u = 1 - (1 - delta0^2)/4, so u <= 3/4 is always safe and 1/(2 "
    "L_max^2) repairs it with a margin. At u = 1 convergence is sublinear, delta_t ~ 1/sqrt(8 t); "
    "above, a* repels. The paper's appendix on heterogeneous clients has 1/(2 L_max^2) already.",
)
