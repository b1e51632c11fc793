"""What averaging does to noise: on factors, on products, on one factor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.noisy_factors import (
    NoisyCase,
    linear_power,
    quadratic_power,
    squared_distances,
)
from fedcore_theory.models.sampling import standard_errors
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Average = Callable[[Array, Array], Array]
"""``A (S, N, r, d_in)`` and ``B (S, N, d_out, r)`` of S draws to products, ``(S, d_out, d_in)``."""

_CLIENTS = 5
_SIGMA = 0.3
_DRAWS = 10_000


def draw(seed: int) -> NoisyCase:
    """5 clients that agree, and 10,000 draws of noise on each factor of each."""
    case = NoisyCase.drawn(seed, clients=_CLIENTS, draws=_DRAWS)
    return NoisyCase(
        np.broadcast_to(case.A[:1], case.A.shape),
        np.broadcast_to(case.B[:1], case.B.shape),
        case.noise_A,
        case.noise_B,
    )


def _of_factors(method: str, A: Array, B: Array) -> Array:
    """A linear method's factors, all draws in one round: they stand side by side in the rank."""
    draws, clients, rank, d_in = A.shape
    d_out = B.shape[2]
    uploads = {
        "A": A.transpose(1, 0, 2, 3).reshape(clients, draws * rank, d_in),
        "B": B.transpose(1, 2, 0, 3).reshape(clients, d_out, draws * rank),
    }
    previous = {name: stack[0] for name, stack in uploads.items()}
    factors = server_round(method, uploads, previous=previous).factors
    own_A = factors["A"].reshape(draws, rank, d_in)
    return np.asarray(factors["B"].reshape(d_out, draws, rank).transpose(1, 0, 2) @ own_A)


def factors_averaged(A: Array, B: Array) -> Array:
    """FedIT."""
    return _of_factors("fedit", A, B)


def B_averaged(A: Array, B: Array) -> Array:
    """FFA-LoRA."""
    return _of_factors("ffa", A, B)


def products_averaged(A: Array, B: Array) -> Array:
    """The mean of products, what every exact method broadcasts."""
    return np.asarray((B @ A).mean(1))


def measure(
    cases: Iterable[NoisyCase],
    of_factors: Average = factors_averaged,
    of_products: Average = products_averaged,
    of_one: Average = B_averaged,
) -> Outcome:
    """Mean noise power of each average against its formula."""
    names = ("factors", "products", "B alone", "wrong", "exact method")
    scores: dict[str, list[float]] = {name: [] for name in names}
    curves: dict[str, dict[str, float]] = {}
    for case in cases:
        A, B = case.A[0], case.B[0]
        linear, quadratic = linear_power(A, B, _SIGMA), quadratic_power(A, B, _SIGMA)
        noisy_A, noisy_B = case.A + _SIGMA * case.noise_A, case.B + _SIGMA * case.noise_B
        frozen_A = np.broadcast_to(A, noisy_A.shape)
        powers = {
            "factors": squared_distances(of_factors(noisy_A, noisy_B), B @ A),
            "products": squared_distances(of_products(noisy_A, noisy_B), B @ A),
            "B alone": squared_distances(of_one(frozen_A, noisy_B), B @ A),
        }
        exact = {
            "factors": linear / _CLIENTS + quadratic / _CLIENTS**2,
            "products": (linear + quadratic) / _CLIENTS,
            "B alone": _SIGMA**2 * len(B) * float((A**2).sum()) / _CLIENTS,
        }
        for name, values in powers.items():
            scores[name].append(abs(standard_errors(values, exact[name])))
        scores["wrong"].append(abs(standard_errors(powers["factors"], exact["products"])))
        shipped = server_round("fedex", {"A": noisy_A[0], "B": noisy_B[0]}).product
        dense = of_products(noisy_A[:1], noisy_B[:1])[0]
        scores["exact method"].append(float(np.abs(shipped - dense).max()))
        curves = curves or {
            f"{name} averaged": {"measured": float(powers[name].mean()), "formula": exact[name]}
            for name in powers
        }
    return Outcome(
        measured=(
            Measured("standard errors, noisy factors averaged", worst(scores["factors"]), "<=", 5),
            Measured(
                "standard errors, noisy products averaged", worst(scores["products"]), "<=", 5
            ),
            Measured("standard errors, noisy B averaged", worst(scores["B alone"]), "<=", 5),
            Measured("factors against the formula of products", least(scores["wrong"]), ">", 5),
            Measured("FedEx off the mean of products", worst(scores["exact method"]), "<=", 1e-12),
        ),
        samples=f"{_DRAWS:,} draws of {_CLIENTS} clients' noise for each of "
        f"{len(scores['wrong'])} models",
        excludes="a true formula fails with probability 6e-7 per number (5 standard errors)",
        curves=curves,
    )


def picture(outcome: Outcome) -> Figure:
    """Measured powers beside their formulas."""
    return bars(outcome.curves, "mean squared error of the product")


CHECK = Check(
    id="D2",
    title="averaged noise",
    claim="Averaging N noisy pairs of factors divides the noise that is linear in sigma by N and "
    "the cross term by N^2; averaging N noisy products divides both by N.",
    source="ours",
    verdict="holds",
    assumptions="Clients agree but for their noise, which is independent; equal weights. Clients "
    "that differ add the covariance of their factors, whatever the noise.",
    data="5 clients, 8 x 10, rank 3, standard normal factors, sigma .3, 10,000 draws; seeds 0 to 2",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=3,
    finding="Exact aggregation carries N times the cross term that averaging factors does: what is "
    "exact without noise is not what is best with it. One noisy factor has no cross term.",
)
