"""At rank one the nearest combination is the best product of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedcore.methods.lora.flora_na.solver import starts
from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.combinations import (
    Coefficients,
    pair_objective,
    squared_error,
    squared_size,
    tail,
)
from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.models.families import FAMILIES, Shape, weighted
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Fit = Callable[[ClientFactors], Array]
"""Clients to the product of their nearest combinations."""


def draw(seed: int) -> dict[str, ClientFactors]:
    """6 clients of a 40 x 50 weight at rank 1, in four families, Dirichlet(1) weights."""
    random = np.random.default_rng(seed)
    shape = Shape(6, 40, 50, 1)
    names = ("indep", "consensus", "round1", "rot")
    return {name: weighted(random, FAMILIES[name](random, shape)) for name in names}


def shipped_product(clients: ClientFactors) -> Array:
    """The method's aggregate."""
    result = server_round("flora_na", {"A": clients.A, "B": clients.B}, clients.weights)
    return result.product


def isotropic(clients: ClientFactors) -> Coefficients:
    """The closed form that treats every block as its trace."""
    p, q = starts(pair_objective(clients))
    return Coefficients(p[0, 1].numpy(), q[0, 1].numpy())


def measure(
    cases: Iterable[Mapping[str, ClientFactors]],
    fit: Fit = shipped_product,
    closed_form: Callable[[ClientFactors], Coefficients] = isotropic,
) -> Outcome:
    """The fit, the closed form and FedAvg's means against the SVD of the mean product."""
    fitted, closed = [], []
    heights: dict[str, dict[str, float]] = {}
    for name, clients in (one for case in cases for one in case.items()):
        best, size = tail(clients) ** 2, squared_size(clients)
        error = float(np.square(clients.mean_product - fit(clients)).sum())
        formula = squared_error(clients, closed_form(clients))
        means = squared_error(clients, Coefficients(clients.weights, clients.weights))
        fitted.append(abs(error / best - 1))
        closed.append(abs(formula / best - 1))
        parts = {"FedAvg": means, "fit": error, "closed form": formula, "SVD": best}
        heights.setdefault(name, {part: value / size for part, value in parts.items()})
    return Outcome(
        measured=(
            Measured("relative difference of f, fit against SVD", worst(fitted), "<=", 1e-9),
            Measured("relative difference of f, closed form", worst(closed), "<=", 1e-9),
        ),
        samples=f"{len(fitted)} rounds",
        curves=heights,
    )


def picture(outcome: Outcome) -> Figure:
    """Relative squared errors of the first round of each family."""
    return bars(outcome.curves, "f / ||M||^2", log_y=True)


CHECK = Check(
    id="N4",
    title="rank one is solved exactly",
    claim="For r = 1 the least f is the error of the best rank-1 matrix, and the isotropic start "
    "attains it.",
    source="ours; the problem is FLoRA-NA's, arXiv 2509.26399",
    verdict="holds",
    assumptions="Rank 1.",
    data="6 clients, 40 x 50, rank 1, families indep, consensus, round1 and rot, Dirichlet(1) "
    "weights; seeds 0 to 9",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=10,
    derivation="M = B_st diag(w) A_st: its singular vectors lie in the clients' spans, and at rank "
    "1 every vector of the span is a combination of the clients. At higher rank the combinations "
    "are a small part of the span.",
    finding="An error anywhere in H, R or T shows here, where the answer is known.",
)
