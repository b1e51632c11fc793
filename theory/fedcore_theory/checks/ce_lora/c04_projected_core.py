"""Cores projected onto common bases mean the same on every client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from fedcore.errors import FedcoreError
from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.checks.ce_lora.c03_private_bases import DRIFTS, Case, draw, uniform_mixes
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.factors import relative
from fedcore_theory.models.tri_factors import CommonBases, TriClients, haar
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Projected = Callable[[TriClients, CommonBases], Array]
"""Clients and the bases of the broadcast to the global model ``(d_out, d_in)``."""


def shipped(clients: TriClients, bases: CommonBases) -> Array:
    """``B_0 (sum w_n B_0^+ B_n R_n A_n A_0^+) A_0`` by the method that has it."""
    previous = {"A": bases.A, "B": bases.B, "R": np.eye(len(bases.A))}
    return server_round("ce_lora.projected", clients.uploads, clients.weights, previous).product


def measure(cases: Iterable[Case], model: Projected = shipped) -> Outcome:
    """Errors against the mean model, in three gauges, and a broadcast that cannot work."""
    projected, unprojected, changed, formula, taken = [], [], [], [], 0
    for seed, case in enumerate(cases):
        for drift in DRIFTS:
            clients = case.clients[drift]
            exact = clients.mean_product
            product = model(clients, case.bases)
            left, right = _projector(case.bases.B), _projector(case.bases.A.T)
            formula.append(relative(product, left @ exact @ right))
            projected.append(relative(product, exact))
            unprojected.append(np.mean([relative(one, exact) for one in uniform_mixes(clients)]))
            gauges = (case.rotated[drift], _stretched(clients, seed))
            changed += [relative(model(other, case.bases), product) for other in gauges]
        try:
            model(clients, CommonBases(case.bases.A, np.zeros_like(case.bases.B)))
            taken += 1
        except FedcoreError:
            pass
    errors = np.array(projected).reshape(-1, len(DRIFTS))
    plain = np.array(unprojected).reshape(-1, len(DRIFTS))
    share = errors[:, 1:] / plain[:, 1:]
    return Outcome(
        measured=(
            Measured("largest change by another gauge", worst(changed), "<=", 1e-10),
            Measured("largest error / that of unprojected cores", worst(share.ravel()), "<", 1),
            Measured("largest difference from P_B M P_A", worst(formula), "<=", 1e-12),
            Measured("largest error without drift", worst(errors[:, 0]), "<=", 1e-13),
            Measured("broadcasts with B_0 = 0 that were taken", taken, "<=", 0),
        ),
        samples=f"{len(errors)} rounds of 6 clients at 4 drifts, in 3 gauges each",
        curves={"projected": errors.mean(0), "unprojected": plain.mean(0)},
    )


def _projector(basis: Array) -> Array:
    """Onto the columns, which need not be orthonormal."""
    u, _, _ = np.linalg.svd(basis, full_matrices=False)
    return np.asarray(u @ u.T)


def _stretched(clients: TriClients, seed: int) -> TriClients:
    """In gauges of condition number 10."""
    random = np.random.default_rng(seed)
    count, rank = clients.R.shape[:2]
    stretch = np.geomspace(1, 10, rank)[:, None]
    gauges = [haar(random, count, rank) @ (stretch * haar(random, count, rank)) for _ in range(2)]
    return clients.regauged(*gauges)


def picture(outcome: Outcome) -> Figure:
    """Both errors over the drift."""
    lines = [
        Line("cores projected onto common bases", DRIFTS, outcome.curves["projected"]),
        Line("cores averaged as they are", DRIFTS, outcome.curves["unprojected"]),
        Line("no better than a zero update", DRIFTS, np.ones(4), bound=True),
    ]
    return trajectories(lines, "drift of the bases", "relative error", log_y=False)


CHECK = Check(
    id="C4",
    title="projected cores",
    claim="R^_n = B_0^+ (B_n R_n A_n) A_0^+ depends on a client's model alone, and B_0 (sum w_n "
    "R^_n) A_0 = P_B M P_A: the part of the mean model that the common bases can hold.",
    source="ours",
    verdict="holds",
    assumptions="Common bases of full rank, orthonormal or not.",
    data="The clients of C3; gauges as drawn, rotated, and of condition number 10; seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    derivation="The pseudo-inverses are linear and see the product only.",
    finding="At the traffic of plain cores the error is about half of theirs, and no gauge "
    "changes it. Bases that leave the common spans still cost.",
)
