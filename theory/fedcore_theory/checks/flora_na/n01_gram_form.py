"""The distance to the mean product from Gram blocks alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fedcore.methods.lora.flora_na.hadamard import HadamardObjective
from fedcore.methods.lora.flora_na.objective import PairObjective
from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import histogram
from fedcore_theory.models.combinations import (
    Coefficients,
    combined,
    pair_objective,
    squared_error,
    start,
)
from fedcore_theory.models.factors import ClientFactors, random_factors
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Build = Callable[[ClientFactors], PairObjective]


class Point(NamedTuple):
    """Clients, coefficients at which f is evaluated, and HiRA's base weight."""

    clients: ClientFactors
    at: Coefficients
    base: Array


def draw(seed: int) -> Point:
    """5 clients of a 23 x 31 weight at rank 4 with nothing in common, and random p, q."""
    random = np.random.default_rng(seed)
    clients = random_factors(random, 5, 23, 31, 4)
    at = Coefficients(random.standard_normal(5), random.standard_normal(5))
    return Point(clients, at, random.standard_normal((23, 31)))


def weighted_form(clients: ClientFactors, base: Array) -> PairObjective:
    """The shipped objective ``||W0 o (M - B^ A^)||^2``."""
    outer, inner = (
        torch.from_numpy(np.ascontiguousarray(side))
        for side in (clients.B.transpose(0, 2, 1), clients.A)
    )
    return HadamardObjective.weighted(
        pair_objective(clients), outer, inner, torch.from_numpy(base), rows=8
    )


def measure(
    cases: Iterable[Point],
    build: Build = pair_objective,
    build_weighted: Callable[[ClientFactors, Array], PairObjective] = weighted_form,
) -> Outcome:
    """Both Gram forms, and the sum over pairs of clients, against the entries themselves."""
    gram, pairs, weighted = [], [], []
    for clients, at, base in cases:
        dense = squared_error(clients, at)
        gram.append(abs(_value(build(clients), at) / dense - 1))
        pairs.append(abs(_sum_over_pairs(clients, at) / dense - 1))
        entries = base * (clients.mean_product - combined(clients, at))
        value = _value(build_weighted(clients, base), at)
        weighted.append(abs(value / float(np.square(entries).sum()) - 1))
    return Outcome(
        measured=(
            Measured("relative difference, Gram form against dense", worst(gram), "<=", 1e-10),
            Measured("relative difference, sum over pairs of products", worst(pairs), "<=", 1e-10),
            Measured("relative difference, weighted by W0", worst(weighted), "<=", 1e-10),
        ),
        samples=f"{len(gram)} random points (p, q) of as many rounds",
        curves={"Gram blocks": gram, "pairs of products": pairs, "weighted by W0": weighted},
    )


def _value(objective: PairObjective, at: Coefficients) -> float:
    return float(objective.value(*start(objective, at)))


def _sum_over_pairs(clients: ClientFactors, at: Coefficients) -> float:
    """``sum Delta_ij Delta_st <B_i A_j, B_s A_t>`` with ``Delta = diag(w) - p q^T``."""
    products = np.einsum("ior,jrc->ijoc", clients.B, clients.A).reshape(len(clients.A) ** 2, -1)
    Delta = (np.diag(clients.weights) - np.outer(at.p, at.q)).ravel()
    return float(Delta @ (products @ products.T) @ Delta)


def picture(outcome: Outcome) -> Figure:
    """How far each form is from the dense one."""
    shown = {name: np.maximum(differences, 1e-17) for name, differences in outcome.curves.items()}
    return histogram(
        shown, "relative difference from the dense form", marks={"allowed": 1e-10}, log_x=True
    )


CHECK = Check(
    id="N1",
    title="the objective from Gram blocks",
    claim="||M - B^ A^||^2 = ||M||^2 - 2 p^T H q + p^T R(q) p with H_ij = sum_n w_n <B_n^T B_i, "
    "A_n A_j^T> and R_ij(q) = <B_i^T B_j, A^ A^^T>, and equals sum Delta_ij Delta_st <B_i A_j, "
    "B_s A_t> with Delta = diag(w) - p q^T. With inner products weighted by W0 o W0 the same form "
    "is ||W0 o (M - B^ A^)||^2.",
    source="ours; the problem is FLoRA-NA's, arXiv 2509.26399",
    verdict="holds",
    assumptions="Equal ranks; any p and q, summing to 1 or not.",
    data="5 clients, 23 x 31, rank 4, standard normal factors, p and q, Dirichlet(1) weights; W0 "
    "standard normal; seeds 0 to 199",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=200,
    derivation="Multiply out: <B_i A_j, B_s A_t> = trace(A_j^T B_i^T B_s A_t) = <B_i^T B_s, A_j "
    "A_t^T>, so that only r x r blocks are left whatever the weight's size.",
    finding="Nothing of the weight's size is needed to know the error of an aggregate, except "
    "under HiRA, where every half-step has to read the base weight.",
)
