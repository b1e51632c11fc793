"""Contraction at rank r, with the rows of A made orthonormal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

D_IN, D_OUT, RANK, CLIENTS, ITERATIONS = 30, 20, 3, 4, 200


@dataclass(frozen=True)
class Case:
    """Clients' targets ``W_n = B_n* A*`` and a start.

    Attributes:
        A: ``(r, d_in)`` A*, with orthonormal rows.
        B: ``(N, d_out, r)`` the clients' B_n*.
        start: ``(r, d_in)`` with orthonormal rows.
    """

    A: Array
    B: Array
    start: Array


Heads = Callable[[Array, Array], Array]
"""Targets ``(N, d_out, d_in)`` and A to the clients' B ``(N, d_out, r)``."""


def draw(seed: int) -> Case:
    """4 clients of a 20 x 30 weight of rank 3."""
    random = np.random.default_rng(seed)
    A = orthonormal_rows(random.standard_normal((RANK, D_IN)))
    B = random.standard_normal((D_OUT, RANK)) + 0.5 * random.standard_normal((CLIENTS, D_OUT, RANK))
    return Case(A, B, orthonormal_rows(A + 0.3 * random.standard_normal((RANK, D_IN))))


def least_squares(targets: Array, A: Array) -> Array:
    """``argmin_B ||B A - W_n||_F = W_n A^T (A A^T)^-1``, for every client."""
    return np.asarray(np.linalg.solve(A @ A.T, A @ targets.swapaxes(1, 2)).swapaxes(1, 2))


def orthonormal_rows(A: Array) -> Array:
    """An orthonormal basis of the row space, by QR."""
    return np.asarray(np.linalg.qr(A.T).Q.T)


def measure(
    cases: Iterable[Case],
    heads: Heads = least_squares,
    orthonormal: Callable[[Array], Array] = orthonormal_rows,
) -> Outcome:
    """200 iterations of every case against the contraction."""
    smallest: list[float] = []
    shares: list[float] = []
    paths: list[list[float]] = []
    bounds: list[list[float]] = []
    for case in cases:
        values = np.linalg.svd(case.B.mean(axis=0), compute_uv=False)
        eta = 1 / (2 * values[0] ** 2)
        A, path, allowed = case.start, [_distance(case.start, case.A)], []
        for _ in range(ITERATIONS):
            moved = _iteration(case, A, eta, heads)
            smallest.append(float(np.linalg.svd(moved, compute_uv=False)[-1]))
            A = orthonormal(moved)
            allowed.append(path[-1] * (1 - 2 * eta * (1 - path[-1] ** 2) * values[-1] ** 2) + 1e-13)
            path.append(_distance(A, case.A))
            shares.append(path[-1] / allowed[-1])
        paths.append(path)
        bounds.append(allowed)
    return Outcome(
        measured=(
            Measured(
                "iterations above the bound", sum(not share <= 1 for share in shares), "<=", 0
            ),
            Measured("worst measured / bound", worst(shares), "<=", 1),
            Measured("worst final distance", worst(path[-1] for path in paths), "<", 1e-12),
            Measured("least singular value of A before QR", least(smallest), ">=", 1 - 1e-12),
        ),
        samples=f"{len(shares)} iterations",
        curves={"paths": paths, "bounds": bounds},
    )


def _iteration(case: Case, A: Array, eta: float, heads: Heads) -> Array:
    """``A - 2 eta B^T (B A - W*)`` by two rounds; clients differ in their targets."""
    targets = case.B @ case.A
    frozen = np.broadcast_to(A, (CLIENTS, *A.shape))
    start = {"A": A, "B": np.zeros((D_OUT, RANK))}
    solved = {"A": frozen, "B": heads(targets, A)}
    B = server_round("rolora", solved, previous=start, round=0).factors["B"]
    steps = A - 2 * eta * np.einsum("or,noi->nri", B, B @ A - targets)
    uploads = {"A": steps, "B": np.broadcast_to(B, (CLIENTS, *B.shape))}
    return server_round("rolora", uploads, previous={"A": A, "B": B}, round=1).factors["A"]


def _distance(A: Array, truth: Array) -> float:
    """``||A (I - A*^T A*)||_2``: with orthonormal rows the largest sine between the row spaces."""
    return float(np.linalg.norm(A - (A @ truth.T) @ truth, 2))


def picture(outcome: Outcome) -> Figure:
    """Up to four runs, and for the first what every iteration allows the next."""
    lines = []
    for n, path in enumerate(outcome.curves["paths"][:4]):
        end = _end(path)
        lines.append(Line(f"measured, seed {n}", range(end), path[:end]))
    first = outcome.curves["bounds"][0]
    end = _end(outcome.curves["paths"][0])
    label = "bound from the distance before, seed 0"
    lines.append(Line(label, range(1, end), first[: end - 1], bound=True))
    return trajectories(lines, "iteration", "largest sine between row spaces")


def _end(path: list[float]) -> int:
    """Up to where rounding begins."""
    return next((t for t, value in enumerate(path) if value < 1e-13), len(path))


CHECK = Check(
    id="R5",
    title="contraction at rank r",
    claim="For W* = B* A* with orthonormal rows of A*, B by least squares, A+ = qr(A - 2 eta B^T "
    "(B A - W*)) and eta = 1/(2 sigma_1(B*)^2): delta+ <= delta (1 - 2 eta (1 - delta^2) "
    "sigma_r(B*)^2), where delta = ||A (I - A*^T A*)||_2; and sigma_r(A+) >= 1 before QR.",
    source="ours",
    verdict="holds",
    assumptions="Infinitely many rows; B* is the mean of the clients' B_n*, which may differ; A "
    "starts with orthonormal rows and delta < 1.",
    data="d_in = 30, d_out = 20, r = 3, 4 clients, B_n* = normal + 0.5 normal, start qr(A* + 0.3 "
    "normal), 200 iterations; seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    derivation="With P = A^T A and B = B* (A* A^T), A (I - A*^T A*) is multiplied by I - 2 eta B^T "
    "B from the left; A+ = A + 2 eta B^T B* A* (I - P), whose terms have orthogonal row spaces, so "
    "sigma_r(A+) >= 1 and QR only divides.",
    finding="The paper's analysis is of rank 1; this is its mechanism at rank r. The rate depends "
    "on the condition of B*.",
)
