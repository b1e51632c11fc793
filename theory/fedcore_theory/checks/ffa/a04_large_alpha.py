"""LoRA with a growing alpha and a step that shrinks with its square becomes FFA-LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore.methods import create_method
from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import orders
from fedcore_theory.models.factors import relative
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gradients = Callable[[Array, Array, Array, float], tuple[Array, Array]]
"""``A``, ``B``, targets ``(N, d_out, d_in)`` and s to gradients ``(N, ...)`` of A and B."""

_ALPHAS = (10.0, 20.0, 40.0, 80.0)
_RANK = 2
_STEP = 0.02
_ROUNDS = 20


@dataclass(frozen=True)
class Clients:
    """Targets ``(N, d_out, d_in)`` and the common ``A (r, d_in)``; B starts at zero."""

    targets: Array
    A: Array


def draw(seed: int) -> Clients:
    """3 Gaussian targets of 6 x 7 at rank 2."""
    random = np.random.default_rng(seed)
    return Clients(random.standard_normal((3, 6, 7)), random.standard_normal((_RANK, 7)))


def gradients(A: Array, B: Array, targets: Array, s: float) -> tuple[Array, Array]:
    """Of ``1/2 ||s B A - W_n||_F^2`` for every client."""
    outer = s * B @ A - targets
    return s * B.T @ outer, s * outer @ A.T


def step(alpha: float) -> float:
    """``eta0 / alpha^2``."""
    return _STEP / alpha**2


def measure(
    cases: Iterable[Clients],
    gradients: Gradients = gradients,
    step: Callable[[float], float] = step,
    method: str = "ffa",
) -> Outcome:
    """Updates along both trajectories for every alpha."""
    spread, slopes, curves = [], [], {}
    for n, case in enumerate(cases):
        frozen = [_train(case, method, alpha, gradients, step(alpha)) for alpha in _ALPHAS]
        both = [_train(case, "fedit", alpha, gradients, step(alpha)) for alpha in _ALPHAS]
        spread.append(worst(relative(one, frozen[0]) for one in frozen[1:]))
        gaps = np.array([relative(*pair) for pair in zip(both, frozen, strict=True)])
        gaps = np.maximum(gaps, np.finfo(float).tiny)
        slopes += list(np.log2(gaps[1:] / gaps[:-1]))
        curves[f"seed {n}"] = (_ALPHAS, gaps)
    return Outcome(
        measured=(
            Measured("relative spread of FFA's updates over alpha", worst(spread), "<=", 1e-13),
            Measured(
                "slope of the gap to LoRA, distance from -2",
                worst(abs(slope + 2) for slope in slopes),
                "<=",
                0.01,
            ),
        ),
        samples=f"{_ROUNDS} rounds at {len(_ALPHAS)} alphas on {len(spread)} federations",
        curves=curves,
    )


def _train(case: Clients, name: str, alpha: float, gradients: Gradients, size: float) -> Array:
    """``s B A`` after every round, ``(T, d_out, d_in)``; one local step per round."""
    method, s = create_method(name), alpha / _RANK
    A, B = case.A, np.zeros((6, _RANK))
    products = []
    for _ in range(_ROUNDS):
        slope_A, slope_B = gradients(A, B, case.targets, s)
        # The server's factors have absorbed s; the client divides it out again.
        uploads = {"A": A - size * slope_A, "B": s * (B - size * slope_B)}
        result = server_round(method, uploads, previous={"A": A, "B": s * B})
        A, B = result.factors["A"], result.factors["B"] / s
        products.append(result.product)
    return np.stack(products)


def picture(outcome: Outcome) -> Figure:
    """The gap against alpha with its slope."""
    return orders(outcome.curves, "alpha", "relative gap of LoRA to FFA-LoRA")


CHECK = Check(
    id="A4",
    title="LoRA at large alpha",
    claim="With step eta0/alpha^2 and B = 0 at the start, FFA-LoRA's updates do not depend on "
    "alpha, and LoRA's differ from them by O(alpha^-2): LoRA becomes FFA-LoRA.",
    source="ours; FFA-LoRA, arXiv 2403.12313, is said to state such a limit, its text was not "
    "available to us",
    verdict="holds",
    assumptions="Plain gradient steps, one per round, s = alpha/r; a fixed number of rounds.",
    data="3 clients with Gaussian targets, 6 x 7, rank 2, 20 rounds, eta0 .02, alpha 10, 20, 40, "
    "80; seeds 0 to 2",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=3,
    finding="alpha and the step are one parameter for FFA-LoRA under gradient descent; for LoRA "
    "the pair says how much A moves beside B.",
)
