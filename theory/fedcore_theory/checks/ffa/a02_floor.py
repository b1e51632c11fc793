"""What a random frozen A cannot represent, at any rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import histogram
from fedcore_theory.models.sampling import standard_errors
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWS = 4000
_FEDERATED = 20
_RANK = 4


@dataclass(frozen=True)
class Targets:
    """Clients' targets and random frozen factors.

    Attributes:
        wanted: ``(N, d_out, d_in)``.
        weights: ``(N,)``.
        frozen: ``(S, r, d_in)``.
    """

    wanted: Array
    weights: Array
    frozen: Array


def draw(seed: int) -> Targets:
    """5 targets of 25 x 40 and 4000 Gaussian A of rank 4."""
    random = np.random.default_rng(seed)
    return Targets(
        random.standard_normal((5, 25, 40)),
        random.dirichlet(np.ones(5)),
        random.standard_normal((_DRAWS, _RANK, 40)),
    )


def floor(wanted: Array, frozen: Array) -> Array:
    """``||W* (I - P)||_F^2`` with P the projector on the rows of each A: ``(S,)``."""
    rows = np.linalg.qr(frozen.transpose(0, 2, 1)).Q
    return np.asarray((wanted**2).sum() - ((wanted @ rows) ** 2).sum((1, 2)))


def share(rank: int, d_out: int, d_in: int) -> float:
    """Of ``||W*||_F^2``, what is lost on average: ``1 - r / d_in``."""
    return 1 - rank / d_in


def shipped(wanted: Array, weights: Array, frozen: Array) -> Array:
    """Every client's least squares ``W_n A^+``, averaged by FFA's server."""
    count = len(wanted)
    uploads = {
        "A": np.broadcast_to(frozen, (count, *frozen.shape)),
        "B": wanted @ np.linalg.pinv(frozen),
    }
    return server_round("ffa", uploads, weights, {"A": frozen}).product


def measure(
    cases: Iterable[Targets],
    product: Callable[[Array, Array, Array], Array] = shipped,
    floor: Callable[[Array, Array], Array] = floor,
    share: Callable[[int, int, int], float] = share,
) -> Outcome:
    """The floor against a federation's loss, and its mean against ``1 - r / d_in``."""
    gaps, scores, ratios = [], [], []
    expected = share(_RANK, 25, 40)
    for case in cases:
        mean = np.einsum("n,noi->oi", case.weights, case.wanted)
        floors = floor(mean, case.frozen)
        for frozen, low in zip(case.frozen[:_FEDERATED], floors[:_FEDERATED], strict=True):
            left = ((mean - product(case.wanted, case.weights, frozen)) ** 2).sum()
            gaps.append(float(abs(left - low) / low))
        shares = np.asarray(floors / (mean**2).sum())
        scores.append(abs(standard_errors(shares, expected)))
        ratios.append(shares)
    return Outcome(
        measured=(
            Measured(
                "relative gap of the federation's loss to the floor", worst(gaps), "<=", 1e-10
            ),
            Measured("standard errors between mean floor and 1 - r/d_in", worst(scores), "<=", 5),
        ),
        samples=f"{_DRAWS:,} random A for each of {len(scores)} targets, {_FEDERATED} of them with "
        "a federation",
        excludes="a true mean fails with probability 6e-7 per target (5 standard errors)",
        curves={"floors": np.concatenate(ratios), "expected": expected},
    )


def picture(outcome: Outcome) -> Figure:
    """The floors of all draws around their mean."""
    return histogram(
        {"random A of rank 4": outcome.curves["floors"]},
        "lowest loss / squared norm of the target",
        marks={"1 - r / d_in": outcome.curves["expected"]},
    )


CHECK = Check(
    id="A2",
    title="floor of a frozen A",
    claim="min over B of ||W* - B A||_F^2 = ||W* (I - P_A)||_F^2, on average over a Gaussian A "
    "(1 - r/d_in) ||W*||_F^2; a federation of clients that solve their own least squares meets it.",
    source="ours",
    verdict="holds",
    assumptions="Loss ||W - W*||_F^2 with white inputs; W* is the weighted mean of the clients' "
    "targets; A has full rank.",
    data="5 Gaussian targets of 25 x 40, Dirichlet(1) weights, 4000 Gaussian A of rank 4; seeds 0 "
    "and 1",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=2,
    derivation="The rank-one case is the factor delta0^2 of RoLoRA's regressor; the mean follows "
    "from E P_A = (r/d_in) I.",
    finding="At rank 4 of 40 a random A leaves nine tenths of a generic target out of reach. What "
    "fine-tuning wants is not generic, so this is a warning and no forecast.",
)
