"""What the mean of the factors misses of the mean of the products is a covariance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.factors import ClientFactors, random_factors
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Federations:
    """One whose identity is checked, and two whose deviations leave room for the full rank."""

    mixed: ClientFactors
    few: ClientFactors
    many: ClientFactors


def draw(seed: int) -> Federations:
    """6 clients of 12 x 9 at rank 3; (N, r) = (3, 2) and (6, 3) of 40 x 30."""
    random = np.random.default_rng(seed)
    return Federations(
        random_factors(random, 6, 12, 9, 3),
        random_factors(random, 3, 40, 30, 2),
        random_factors(random, 6, 40, 30, 3),
    )


def shipped(clients: ClientFactors) -> Array:
    """FedIT's product, ``Bbar Abar``."""
    return server_round("fedit", {"A": clients.A, "B": clients.B}, clients.weights).product


def measure(
    cases: Iterable[Federations], product: Callable[[ClientFactors], Array] = shipped
) -> Outcome:
    """Both forms of the covariance against the product, the bound and the rank."""
    centred, pairwise, ratios, ranks = [], [], [], []
    spectra: list[Array] = []
    for case in cases:
        clients = case.mixed
        missed = clients.mean_product - product(clients)
        centred.append(float(np.abs(missed - _centred(clients)).max()))
        pairwise.append(float(np.abs(missed - _pairwise(clients)).max()))
        ratios.append(float(np.linalg.norm(missed)) / _bound(clients))
        for wide, rank in ((case.few, 2), (case.many, 3)):
            values = np.linalg.svd(wide.mean_product - product(wide)).S
            expected = rank * (len(wide.weights) - 1)
            ranks.append(abs(int((values > 1e-12 * values[0]).sum()) - expected))
        spectra.append(values / max(values[0], np.finfo(float).tiny))
    return Outcome(
        measured=(
            Measured("largest entry off the centred form", worst(centred), "<=", 1e-13),
            Measured("largest entry off the pairwise form", worst(pairwise), "<=", 1e-13),
            Measured("largest norm / Cauchy-Schwarz bound", worst(ratios), "<=", 1 + 1e-12),
            Measured("largest distance of the rank from r (N - 1)", worst(ranks), "<=", 0),
        ),
        samples=f"{len(centred)} rounds, and two more each for the rank",
        curves={"spectra": spectra},
    )


def _deviations(clients: ClientFactors) -> tuple[Array, Array]:
    means = (np.tensordot(clients.weights, side, 1) for side in (clients.B, clients.A))
    B, A = means
    return clients.B - B, clients.A - A


def _centred(clients: ClientFactors) -> Array:
    """``sum_n w_n (B_n - Bbar)(A_n - Abar)``."""
    return np.asarray(np.einsum("n,nor,nri->oi", clients.weights, *_deviations(clients)))


def _pairwise(clients: ClientFactors) -> Array:
    """``1/2 sum_ij w_i w_j (B_i - B_j)(A_i - A_j)``."""
    B, A = (side[:, None] - side[None] for side in (clients.B, clients.A))
    return 0.5 * np.asarray(np.einsum("i,j,ijor,ijrk->ok", clients.weights, clients.weights, B, A))


def _bound(clients: ClientFactors) -> float:
    """``(sum_n w_n ||dB_n||^2 sum_n w_n ||dA_n||^2)^(1/2)``."""
    spreads = [clients.weights @ (side**2).sum((1, 2)) for side in _deviations(clients)]
    return float(np.sqrt(spreads[0] * spreads[1]))


def picture(outcome: Outcome) -> Figure:
    """The error's singular values end where the rank says."""
    spectra = np.array(outcome.curves["spectra"])
    numbers = np.arange(1, spectra.shape[1] + 1)
    return trajectories(
        [
            Line("largest over the rounds", numbers, spectra.max(0)),
            Line("smallest over the rounds", numbers, spectra.min(0)),
            Line("r (N - 1) = 15", [15.5, 15.5], [1, 1e-18], bound=True),
        ],
        "number of the singular value, 6 clients of rank 3",
        "singular value of the error / largest",
    )


CHECK = Check(
    id="V1",
    title="covariance identity",
    claim="M - Bbar Abar = sum w_n (B_n - Bbar)(A_n - Abar) = 1/2 sum w_i w_j (B_i - B_j)"
    "(A_i - A_j); its norm is at most (sum w ||dB||^2 sum w ||dA||^2)^(1/2) and its rank r (N - 1) "
    "where the dimensions allow.",
    source="ours",
    verdict="holds",
    assumptions="Weights sum to 1; scalings are absorbed; all clients have the same rank.",
    data="6 clients of 12 x 9 at rank 3; for the rank 3 clients of rank 2 and 6 of rank 3, 40 x "
    "30; standard normal factors, Dirichlet(1) weights; seeds 0 to 9",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=10,
    derivation="Expand the products around the means; Cauchy-Schwarz for the norm. The deviations "
    "of N clients from their mean are dependent, which takes one r off the rank.",
    finding="FedAvg of factors is exact whenever one of them is common, and what it loses "
    "otherwise is known to the server: N - 1 pairs of factors describe it.",
)
