"""One round of Gram adapters: the factors that clients start from and send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedcore.methods import Method
from fedcore_theory.rounds import Array, server_round

RANK, WIDTH, CLIENTS, DEVIATION = 4, 60, 6, 0.3
"""Of :func:`default_round`."""


@dataclass(frozen=True)
class GramRound:
    """What a server of Gram adapters sees in a round.

    Attributes:
        previous: ``A_prev (r, k)``, from which all clients start.
        A: ``(N, r, k)`` what they send.
        weights: ``(N,)``, their sum is 1.
    """

    previous: Array
    A: Array
    weights: Array

    @property
    def stack(self) -> Array:
        """``F (N r, k)``, the rows of ``sqrt(w_n) A_n``."""
        return np.asarray((np.sqrt(self.weights)[:, None, None] * self.A).reshape(-1, self.width))

    @property
    def gram(self) -> Array:
        """``Q = sum_n w_n A_n^T A_n (k, k)``, formed entry by entry."""
        return np.asarray(np.einsum("n,nri,nrj->ij", self.weights, self.A, self.A))

    @property
    def previous_gram(self) -> Array:
        """``Q_prev = A_prev^T A_prev (k, k)``."""
        return gram_of(self.previous)

    @property
    def mean(self) -> Array:
        """``Abar = sum_n w_n A_n (r, k)``."""
        return np.asarray(np.einsum("n,nri->ri", self.weights, self.A))

    @property
    def rms(self) -> float:
        """``(sum_n w_n ||A_n - A_prev||_F^2)^(1/2)``, how far the clients went."""
        squares = ((self.A - self.previous) ** 2).sum((1, 2))
        return float(np.sqrt(self.weights @ squares))

    @property
    def rank(self) -> int:
        """Rows r of a factor."""
        return int(self.A.shape[1])

    @property
    def width(self) -> int:
        """Columns k of a factor."""
        return int(self.A.shape[2])


def gram_round(
    random: np.random.Generator,
    previous: Array,
    clients: int = CLIENTS,
    deviation: float = DEVIATION,
) -> GramRound:
    """``A_n = A_prev + deviation N(0, 1)`` and Dirichlet(1) weights."""
    noise = random.standard_normal((clients, *previous.shape))
    return GramRound(previous, previous + deviation * noise, random.dirichlet(np.ones(clients)))


def default_round(seed: int) -> GramRound:
    """6 clients at rank 4 and width 60, a standard normal start, deviations of .3 per entry."""
    random = np.random.default_rng(seed)
    return gram_round(random, random.standard_normal((RANK, WIDTH)))


def rounds_of(seed: int, deviations: Sequence[float]) -> list[GramRound]:
    """The default round at several deviations, all with one start, noise and weights."""
    rounds = []
    for deviation in deviations:
        random = np.random.default_rng(seed)
        start = random.standard_normal((RANK, WIDTH))
        rounds.append(gram_round(random, start, deviation=deviation))
    return rounds


def gram_step(method: str | Method, case: GramRound) -> Array:
    """The next ``A (r, k)`` by a shipped method."""
    result = server_round(method, {"A": case.A}, case.weights, {"A": case.previous})
    return result.factors["A"]


GramStep = Callable[[GramRound], Array]
"""A round to the next factor ``A (r, k)``."""


def truncated(case: GramRound) -> Array:
    """``florg.truncated``."""
    return gram_step("florg.truncated", case)


def sketched(case: GramRound) -> Array:
    """``florg.sketched``, the batch form on all factors."""
    return gram_step("florg.sketched", case)


def whitened(case: GramRound) -> Array:
    """``florg.whitened``, the sketched step from a weighted sum of ``(V A_n^T) A_n`` alone."""
    return gram_step("florg.whitened", case)


def mean_factor(case: GramRound) -> Array:
    """``florg.avg_a``."""
    return gram_step("florg.avg_a", case)


def squared_drift(A: Array, case: GramRound) -> float:
    """``||A - A_prev||_F^2``."""
    return float(((A - case.previous) ** 2).sum())


def gram_of(A: Array) -> Array:
    """``A^T A``."""
    return np.asarray(A.T @ A)


def tail(gram: Array, rank: int) -> float:
    """``(sum_{i>r} lambda_i^2)^(1/2)``, the error of the best Gram of rank r."""
    return float(np.linalg.norm(np.linalg.eigvalsh(gram)[: len(gram) - rank]))


def bures_wasserstein(P: Array, Q: Array) -> float:
    """``d_BW(P, Q)^2 = tr P + tr Q - 2 tr (P^(1/2) Q P^(1/2))^(1/2)`` of two Grams ``(k, k)``.

    Roots of eigenvalues that are rounding noise, about 1e-16 each, are about 1e-8 each: the result
    is good to about 1e-7 of the traces, not to 1e-15.
    """
    values, vectors = np.linalg.eigh(P)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ Q @ root)
    return float(np.trace(P) + np.trace(Q) - 2 * np.sqrt(np.maximum(inner, 0)).sum())


def orthogonal(random: np.random.Generator, size: int) -> Array:
    """A Haar-distributed orthogonal matrix, rotations and reflections alike."""
    Q, R = np.linalg.qr(random.standard_normal((size, size)))
    return np.asarray(Q * np.sign(np.diag(R)))
