"""FedAvg of factors depends on how each client happens to write its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.factors import ClientFactors, relative
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLIENTS, _RANK, _D_OUT, _D_IN = 5, 4, 30, 25


@dataclass(frozen=True)
class Written:
    """The same models twice: as trained, and with every client's factors rotated."""

    plain: ClientFactors
    turned: ClientFactors


def draw(seed: int) -> Written:
    """5 clients near common factors of 30 x 25 at rank 4, and Haar rotations."""
    random = np.random.default_rng(seed)
    A = random.standard_normal((_RANK, _D_IN)) + 0.1 * random.standard_normal(
        (_CLIENTS, _RANK, _D_IN)
    )
    B = random.standard_normal((_D_OUT, _RANK)) + 0.1 * random.standard_normal(
        (_CLIENTS, _D_OUT, _RANK)
    )
    weights = np.full(_CLIENTS, 1 / _CLIENTS)
    q, r = np.linalg.qr(random.standard_normal((_CLIENTS, _RANK, _RANK)))
    turns = q * np.sign(np.einsum("nii->ni", r))[:, None]
    return Written(
        ClientFactors(A, B, weights),
        ClientFactors(turns.transpose(0, 2, 1) @ A, B @ turns, weights),
    )


def shipped(clients: ClientFactors) -> Array:
    """FedIT's product."""
    return server_round("fedit", {"A": clients.A, "B": clients.B}, clients.weights).product


def measure(
    cases: Iterable[Written], product: Callable[[ClientFactors], Array] = shipped
) -> Outcome:
    """Relative errors before and after the rotations; the SVD of the mean product as control."""
    growth, moved, steady, shown = [], [], [], {}
    for n, case in enumerate(cases):
        before, after = (
            relative(product(clients), clients.mean_product)
            for clients in (case.plain, case.turned)
        )
        growth.append(after / before)
        models = [clients.B @ clients.A for clients in (case.plain, case.turned)]
        moved.append(relative(models[1], models[0]))
        plain, turned = (_exact(clients) for clients in (case.plain, case.turned))
        steady.append(relative(turned, plain))
        shown[f"seed {n}"] = {
            "mean of factors": before,
            "mean of factors, rotated": after,
            "product SVD": relative(plain, case.plain.mean_product),
            "product SVD, rotated": relative(turned, case.turned.mean_product),
        }
    return Outcome(
        measured=(
            Measured("growth of the relative error", least(growth), ">", 50),
            Measured("relative change of the clients' models", worst(moved), "<=", 1e-14),
            Measured("relative change of product SVD's result", worst(steady), "<=", 1e-12),
        ),
        samples=f"{len(growth)} rounds",
        curves=shown,
    )


def _exact(clients: ClientFactors) -> Array:
    uploads = {"A": clients.A, "B": clients.B}
    return server_round("product_svd", uploads, clients.weights).product


def picture(outcome: Outcome) -> Figure:
    """Errors before and after, of a rule on factors and of one on products."""
    return bars(outcome.curves, "relative aggregation error", log_y=True)


CHECK = Check(
    id="V4",
    title="gauge dependence of FedAvg",
    claim="Rotating each client's factors by its own O_n, (B_n O_n, O_n^T A_n), changes no "
    "client's model, but makes a small error of the mean of factors one of the size of "
    "the update.",
    source="ours",
    verdict="holds",
    assumptions="Clients near a common start; rotations drawn independently.",
    data="5 clients, 30 x 25, rank 4: common Gaussian factors + .1 N(0, 1), Haar rotations, equal "
    "weights; seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    finding="The mean of factors relies on the common start, not on the clients' models being "
    "close. Rules on products do not.",
)
