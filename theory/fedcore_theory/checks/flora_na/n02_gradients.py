"""The gradients that the alternating half-steps set to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from fedcore.methods.lora.flora_na.objective import PairObjective
from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.checks.flora_na.n01_gram_form import Build, Point, draw, weighted_form
from fedcore_theory.figures import histogram
from fedcore_theory.models.coefficient_descents import gradients
from fedcore_theory.models.combinations import Coefficients, combined, pair_objective, start
from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gradients = Callable[[PairObjective, Coefficients], Coefficients]

_STEP = 1e-4
"""Of the central differences, which are exact up to rounding: f is quadratic in p and in q."""


def from_blocks(objective: PairObjective, at: Coefficients) -> Coefficients:
    """``2 (R(q) p - H q)`` and ``2 (T(p) q - H^T p)`` of the shipped objective."""
    left, right = gradients(objective, *start(objective, at))
    return Coefficients(left[0, 0].numpy(), right[0, 0].numpy())


def measure(
    cases: Iterable[Point],
    build: Build = pair_objective,
    build_weighted: Callable[[ClientFactors, Array], PairObjective] = weighted_form,
    slopes: Gradients = from_blocks,
) -> Outcome:
    """The gradients of both objectives against central differences of the dense ones."""
    errors: dict[str, list[float]] = {}
    for clients, at, base in cases:
        forms = {
            "": (build(clients), np.ones_like(base)),
            ", weighted by W0": (build_weighted(clients, base), base),
        }
        for form, (objective, entries) in forms.items():
            pairs = zip(slopes(objective, at), _differences(clients, at, entries), strict=True)
            for name, (slope, right) in zip("pq", pairs, strict=True):
                error = float(np.linalg.norm(slope - right) / np.linalg.norm(right))
                errors.setdefault(f"gradient in {name}{form}", []).append(error)
    return Outcome(
        measured=tuple(
            Measured(f"relative error, {name}", worst(values), "<=", 1e-6)
            for name, values in errors.items()
        ),
        samples=f"{len(errors['gradient in p'])} random points of as many rounds",
        curves=errors,
    )


def _differences(clients: ClientFactors, at: Coefficients, base: Array) -> Coefficients:
    """Of ``||W0 o (M - B^ A^)||_F^2``, formed entry by entry."""
    M = clients.mean_product

    def slope(side: str, move: Array) -> float:
        ahead, behind = (
            float(np.square(base * (M - combined(clients, point))).sum())
            for point in (
                at._replace(**{side: getattr(at, side) + sign * move}) for sign in (1, -1)
            )
        )
        return (ahead - behind) / (2 * _STEP)

    moves = _STEP * np.eye(len(at.p))
    return Coefficients(*(np.array([slope(side, move) for move in moves]) for side in "pq"))


def picture(outcome: Outcome) -> Figure:
    """How far the gradients are from differences."""
    return histogram(
        outcome.curves, "relative error of the gradient", marks={"allowed": 1e-6}, log_x=True
    )


CHECK = Check(
    id="N2",
    title="gradients of the objective",
    claim="grad_p f = 2 (R(q) p - H q) and grad_q f = 2 (T(p) q - H^T p), T_ij(p) = <A_i A_j^T, "
    "B^^T B^>; likewise with inner products weighted by W0 o W0.",
    source="ours; the problem is FLoRA-NA's, arXiv 2509.26399",
    verdict="holds",
    assumptions="Equal ranks.",
    data="5 clients, 23 x 31, rank 4, standard normal factors, p, q and W0, Dirichlet(1) weights; "
    "seeds 0 to 49; differences of step 1e-4 of the dense objectives",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=50,
    derivation="f is quadratic in p for a fixed q and the other way round, so that central "
    "differences carry no truncation error and a half-step is one linear solve.",
    finding="Setting one of them to zero is the half-step of alternating least squares.",
)
