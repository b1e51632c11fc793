"""Local gradient steps on a factored least-squares fit, and the rank-one regressor in rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedcore.methods import create_method
from fedcore_theory.rounds import Array, server_round


class Pairs(NamedTuple):
    """Every client's ``A (N, r, d_in)`` and ``B (N, d_out, r)``."""

    A: Array
    B: Array


def fit_slopes(A: Array, B: Array, targets: Array) -> Pairs:
    """Gradients of ``l_n = ||B_n A_n - W_n||_F^2``."""
    outer = 2 * (B @ A - targets)
    return Pairs(B.transpose(0, 2, 1) @ outer, outer @ A.transpose(0, 2, 1))


def simultaneous(start: Pairs, targets: Array, step: float, steps: int) -> Pairs:
    """``steps`` gradient steps on A and B at once."""
    A, B = start
    for _ in range(steps):
        slopes = fit_slopes(A, B, targets)
        A, B = A - step * slopes.A, B - step * slopes.B
    return Pairs(A, B)


def sequential(start: Pairs, targets: Array, step: float, steps: int) -> Pairs:
    """``steps`` times: one step on B, then one on A at the new B."""
    A, B = start
    for _ in range(steps):
        B = B - step * fit_slopes(A, B, targets).B
        A = A - step * fit_slopes(A, B, targets).A
    return Pairs(A, B)


@dataclass(frozen=True)
class Regressors:
    """Linear regressors ``b_n* a*^T`` of N clients with infinitely many rows of white inputs.

    ``l_n(a, b) = ||b_n* a*^T - b a^T||_F^2``, whose mean over clients exceeds its spread
    ``gamma^2 = mean ||b_n* - bm||^2`` by ``||bm a*^T - b a^T||_F^2``, ``bm = mean b_n*``.

    Attributes:
        direction: ``a* (d_in,)``, of length 1.
        heads: ``b_n* (N, d_out)``.
        start: the ``a`` that all clients start from, of length 1.
    """

    direction: Array
    heads: Array
    start: Array

    @property
    def mean_head(self) -> Array:
        """``bm``."""
        return np.asarray(self.heads.mean(0))

    @property
    def targets(self) -> Array:
        """``b_n* a*^T``, ``(N, d_out, d_in)``."""
        return self.heads[:, :, None] * self.direction

    def excess(self, product: Array) -> float:
        """What the mean loss of a model ``b a^T`` exceeds ``gamma^2`` by."""
        return float(((np.outer(self.mean_head, self.direction) - product) ** 2).sum())


class History(NamedTuple):
    """Per round: the loss beyond ``gamma^2``, and what the server's product misses of the mean."""

    excess: Array
    missed: Array


Local = Callable[[Regressors, Pairs, frozenset[str], float, int], Pairs]
"""Clients, their start, what trains, step and steps to the clients' factors."""


def local_steps(
    clients: Regressors, start: Pairs, trains: frozenset[str], step: float, steps: int
) -> Pairs:
    """Gradient steps on the factors in ``trains``, at once where it is both."""
    A, B = start
    for _ in range(steps):
        slopes = fit_slopes(A, B, clients.targets)
        A = A - step * slopes.A if "A" in trains else A
        B = B - step * slopes.B if "B" in trains else B
    return Pairs(A, B)


def federate(
    name: str,
    clients: Regressors,
    step: float,
    steps: int,
    rounds: int,
    local: Local = local_steps,
) -> History:
    """Rounds of a shipped LoRA method from ``a = start`` and ``b = 0``."""
    method = create_method(name)
    count, width = clients.heads.shape
    A, B = clients.start[None], np.zeros((width, 1))
    excess, missed = np.empty(rounds), np.empty(rounds)
    for t in range(rounds):
        common = Pairs(np.broadcast_to(A, (count, *A.shape)), np.broadcast_to(B, (count, *B.shape)))
        trained = local(clients, common, method.plan(t).trains, step, steps)
        result = server_round(method, trained._asdict(), previous={"A": A, "B": B}, round=t)
        A, B = result.factors["A"], result.factors["B"]
        excess[t] = clients.excess(result.product)
        missed[t] = np.linalg.norm((trained.B @ trained.A).mean(0) - result.product)
    return History(excess, missed)
