"""Nested ranks: padding is exact, and forgets rows that few clients hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.rounds import Array, Round, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = (1, 2, 3, 4)
COVERAGE = (1.0, 0.75, 0.5, 0.25)
"""The share of clients that hold each rank."""

ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """The global ``A (4, d_in)`` and ``B (d_out, 4)``, and what clients trained of B: N of them."""

    A: Array
    B: Array
    trained: Array


Step = Callable[[Array, Array, Array], Round]
"""A (4, d_in), the clients' zero-padded B (N, d_out, 4) and the global B to the round."""


def draw(seed: int) -> Case:
    """4 clients of ranks 1 to 4 of a 9 x 12 weight; columns of B have length 1."""
    random = np.random.default_rng(seed)
    B = random.standard_normal((9, 4))
    return Case(
        random.standard_normal((4, 12)),
        B / np.linalg.norm(B, axis=0),
        _padded(random.standard_normal((4, 9, 4))),
    )


def shipped(A: Array, B: Array, previous: Array) -> Round:
    """RoLoRA's server, given the ranks: what a client lacks stays as it was."""
    stacked = {"A": np.broadcast_to(A, (len(B), *A.shape)), "B": B}
    return server_round("rolora", stacked, previous={"A": A, "B": previous}, ranks=RANKS)


def padded(A: Array, B: Array, previous: Array) -> Round:
    """RoLoRA's server, to which padding passes for trained values."""
    stacked = {"A": np.broadcast_to(A, (len(B), *A.shape)), "B": B}
    return server_round("rolora", stacked, previous={"A": A, "B": previous})


def measure(cases: Iterable[Case], step: Step = shipped, naive: Step = padded) -> Outcome:
    """A round of trained clients, and five rounds of clients that train nothing."""
    exact: list[float] = []
    decay: list[float] = []
    drifts: list[float] = []
    norms: dict[str, list[Array]] = {}
    for case in cases:
        zeros = np.einsum("nor,ri->oi", case.trained, case.A) / len(RANKS)
        filled = np.where(_padded(np.ones_like(case.trained)) > 0, case.trained, case.B)
        completed = np.einsum("nor,ri->oi", filled, case.A) / len(RANKS)
        for rule, right in ((naive, zeros), (step, completed)):
            product = rule(case.A, case.trained, case.B).product
            exact.append(float(np.abs(product - right).max()))
        paths = {"padded": _idle(case, naive), "shipped": _idle(case, step)}
        decay.append(float(np.abs(paths["padded"][-1] - np.power(COVERAGE, ROUNDS)).max()))
        drifts.append(float(np.abs(paths["shipped"] - 1).max()))
        norms = norms or {name: list(path) for name, path in paths.items()}
    return Outcome(
        measured=(
            Measured("padding as values: distance from coverage^5", worst(decay), "<=", 1e-14),
            Measured("largest entry of a round's error", worst(exact), "<=", 1e-14),
            Measured(
                "shipped: largest change of an idle column's length", worst(drifts), "<=", 1e-14
            ),
        ),
        samples=f"{len(decay)} federations, {ROUNDS} idle rounds each",
        curves=norms,
    )


def _idle(case: Case, step: Step) -> Array:
    """``(6, 4)`` the lengths of B's columns while clients return what they were sent."""
    B, lengths = case.B, [np.linalg.norm(case.B, axis=0)]
    for _ in range(ROUNDS):
        sent = _padded(np.broadcast_to(B, (len(RANKS), *B.shape)))
        B = step(case.A, sent, B).factors["B"]
        lengths.append(np.linalg.norm(B, axis=0))
    return np.array(lengths)


def _padded(B: Array) -> Array:
    """The clients' leading columns, zeros beyond their rank."""
    holds = np.arange(B.shape[2]) < np.array(RANKS)[:, None]
    return np.asarray(np.where(holds[:, None, :], B, 0.0))


def picture(outcome: Outcome) -> Figure:
    """The lengths of the columns, by the share of clients that hold them."""
    lines = []
    naive, completed = (np.array(outcome.curves[name]) for name in ("padded", "shipped"))
    rounds = np.arange(ROUNDS + 1)
    for rank in range(1, len(RANKS)):
        share = COVERAGE[rank]
        lines.append(Line(f"padded, held by {share:.0%}", rounds, naive[:, rank]))
        lines.append(Line(f"{share:g}^t", rounds, share**rounds, bound=True))
    lines.append(Line("shipped, held by 25%", rounds, completed[:, -1]))
    return trajectories(lines, "idle round", "length of B's column")


CHECK = Check(
    id="R13",
    title="padded ranks",
    claim="Averaging zero-padded factors of nested ranks aggregates exactly, yet shrinks rank j by "
    "its coverage, the share of clients that hold it, in every round: after t rounds of idle "
    "clients the column's length is coverage^t.",
    source="ours",
    verdict="holds",
    assumptions="Client n holds the leading r_n rows of the common A; equal weights.",
    data="4 clients of ranks 1 to 4, 9 x 12, columns of B of length 1; seed 0",
    draw=draw,
    measure=measure,
    picture=picture,
    derivation="The mean's column j is coverage_j times the held one's.",
    finding="Exactness with respect to padded uploads does not protect the model: five idle rounds "
    "leave .001 of the last rank. The shipped rule puts the broadcast's rows where a client has "
    "none, and idle clients change nothing.",
)
