"""RoLoRA's linear regressor: clients with Y_n = X_n a* b_n*^T fit b a^T, b and a in turns.

Client n's loss over its m rows is ``l_n(a, b) = ||X_n (a* b_n*^T - a b^T)||_F^2 / m``. It depends
on the data through ``S_n = X_n^T X_n / m`` alone, which is what is drawn and kept here. ``a^T`` is
the factor A, at rank 1, and ``b`` the factor B; both are averaged by the shipped method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from fedcore_theory.rounds import Array, server_round

CONVERGED = 1e-12
"""The sine below which rounding, not the method, decides the next one."""


@dataclass(frozen=True)
class Regression:
    """The problem of N clients.

    Attributes:
        truth: ``(d,)`` a*, of length 1.
        heads: ``(N, k)`` the clients' b_n*.
        covariances: ``(N, d, d)`` the clients' S_n.
    """

    truth: Array
    heads: Array
    covariances: Array

    @property
    def mean_head(self) -> Array:
        """``b* = mean_n b_n*``."""
        return np.asarray(self.heads.mean(axis=0))

    @property
    def scale(self) -> float:
        """``||b*||``."""
        return float(np.linalg.norm(self.mean_head))

    def tangent(self, a: Array) -> float:
        """``tan`` of the angle between ``a``, of any length, and a*; accurate down to 0."""
        along = float(self.truth @ a)
        return float(np.linalg.norm(a - along * self.truth)) / abs(along)

    def sine(self, a: Array) -> float:
        """``delta = ||(I - a* a*^T) a|| / ||a||``."""
        across = a - (self.truth @ a) * self.truth
        return float(np.linalg.norm(across) / np.linalg.norm(a))

    def resampled(self, random: np.random.Generator, rows: int) -> Regression:
        """The same truth seen through new data."""
        return replace(
            self, covariances=covariances(random, len(self.heads), rows, self.truth.size)
        )


def covariances(random: np.random.Generator, count: int, rows: int, width: int) -> Array:
    """``(count, width, width)`` matrices ``X^T X / rows`` of standard normal X, rows x width.

    Bartlett's decomposition of the Wishart law draws the triangular factor of ``X^T X`` in place of
    X, which makes a client of thousands of rows as cheap as one of a dozen.
    """
    root = np.tril(random.standard_normal((count, width, width)), -1)
    index = np.arange(width)
    root[:, index, index] = np.sqrt(random.chisquare(rows - index, (count, width)))
    return np.asarray(root @ root.swapaxes(1, 2) / rows)


def random_regression(
    random: np.random.Generator, clients: int, rows: int | None, width: int
) -> Regression:
    """A random direction, a standard normal head for all; ``S_n = I`` if there are no ``rows``."""
    truth, head = unit(random.standard_normal(width)), random.standard_normal(width)
    common = Regression(
        truth,
        heads=np.broadcast_to(head, (clients, width)),
        covariances=np.broadcast_to(np.eye(width), (clients, width, width)),
    )
    return common if rows is None else common.resampled(random, rows)


def at_sine(random: np.random.Generator, truth: Array, sine: float) -> Array:
    """``sqrt(1 - sine^2) a* + sine o`` with a random unit ``o`` across a*."""
    across = random.standard_normal(truth.size)
    across = unit(across - (truth @ across) * truth)
    return np.asarray(np.sqrt(1 - sine**2) * truth + sine * across)


def unit(vector: Array) -> Array:
    """``vector / ||vector||``."""
    return np.asarray(vector / np.linalg.norm(vector))


def client_heads(problem: Regression, a: Array) -> Array:
    """``(N, k)`` the clients' ``argmin_b l_n = (a^T S_n a* / a^T S_n a) b_n*``."""
    seen = problem.covariances @ a
    return np.asarray((seen @ problem.truth / (seen @ a))[:, None] * problem.heads)


def client_gradients(problem: Regression, a: Array, b: Array) -> Array:
    """``(N, d)`` the clients' ``grad_a l_n = 2 S_n (a ||b||^2 - a* (b_n*^T b))``."""
    residuals = (b @ b) * a - np.outer(problem.heads @ b, problem.truth)
    return np.asarray(2 * np.einsum("nij,nj->ni", problem.covariances, residuals))


@dataclass(frozen=True)
class Iterate:
    """One iteration: the averaged head ``b`` and ``a`` after its step, ``moved`` before scaling."""

    b: Array
    moved: Array
    a: Array


Iteration = Callable[[Regression, Array, float], Iterate]
"""The problem, ``a`` and the step size ``eta`` to one iteration."""


def alternate(
    problem: Regression,
    a: Array,
    eta: float,
    *,
    heads: Callable[[Regression, Array], Array] = client_heads,
    gradients: Callable[[Regression, Array, Array], Array] = client_gradients,
    scaled: Callable[[Array], Array] = unit,
) -> Iterate:
    """Two rounds: clients solve for b, then step from ``a``; the server averages either.

    Args:
        heads: the clients' part of the first round.
        gradients: the clients' part of the second.
        scaled: what makes the averaged step the next ``a``.
    """
    b = averaged_heads(heads(problem, a), a)
    steps = a - eta * gradients(problem, a, b)
    stacked = {"A": steps[:, None, :], "B": np.broadcast_to(b[:, None], (len(steps), b.size, 1))}
    previous = {"A": a[None], "B": b[:, None]}
    moved = server_round("rolora", stacked, previous=previous, round=1).factors["A"][0]
    return Iterate(b, moved, scaled(moved))


def averaged_heads(heads: Array, a: Array) -> Array:
    """``(k,)`` what the server makes of the clients' ``(N, k)`` heads while ``a`` is frozen."""
    count, size = heads.shape
    stacked = {"A": np.broadcast_to(a, (count, 1, a.size)), "B": heads[:, :, None]}
    previous = {"A": a[None], "B": np.zeros((size, 1))}
    return server_round("rolora", stacked, previous=previous, round=0).factors["B"][:, 0]


@dataclass(frozen=True)
class Move:
    """An iteration of a run: the data it saw, where it began and what it made."""

    problem: Regression
    start: Array
    result: Iterate


def descend(
    problems: Iterable[Regression], a: Array, eta: float, iteration: Iteration = alternate
) -> Iterator[Move]:
    """One move for each of ``problems``, until the sine has come down to rounding."""
    for problem in problems:
        move = Move(problem, a, iteration(problem, a, eta))
        yield move
        a = move.result.a
        if problem.sine(a) < CONVERGED:
            return


@dataclass(frozen=True)
class Deviations:
    """``eps' = ||bbar - (a^T a*) b*|| / (delta ||b*||)`` and ``eps~ = ||mean_n S_n - I||_2``."""

    head: float
    data: float


def deviations(problem: Regression, a: Array) -> Deviations:
    """Both deviations of clients with a common head, from the definitions, at unit ``a``."""
    apart = client_heads(problem, a).mean(axis=0) - (a @ problem.truth) * problem.mean_head
    mean = problem.covariances.mean(axis=0)
    return Deviations(
        head=float(np.linalg.norm(apart)) / (problem.sine(a) * problem.scale),
        data=float(np.abs(np.linalg.eigvalsh(mean - np.eye(len(mean)))).max()),
    )


def next_tangent(tangent: Array, u: float) -> Array:
    """``tan (1 - 2u cos^2) / (1 + 2u sin^2)``: infinitely many rows, ``u = eta ||b*||^2``."""
    cosine_squared = 1 / (1 + tangent**2)
    return np.asarray(tangent * (1 - 2 * u * cosine_squared) / (1 + 2 * u * (1 - cosine_squared)))
