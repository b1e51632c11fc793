"""Federated training of a Gram adapter on quadratics, with the optimisers that clients use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedcore_theory.models.gram_rounds import GramRound
from fedcore_theory.rounds import Array


@dataclass(frozen=True)
class GramProblem:
    """N clients' losses ``F_n(A) = 1/2 ||left A^T A right - C_n||_F^2``.

    Attributes:
        left: ``(d_out, k)``, orthonormal columns.
        right: ``(k, d_in)``, orthonormal rows.
        targets: ``C_n (N, d_out, d_in)``.
        start: ``(r, k)`` the factor of round 0.
    """

    left: Array
    right: Array
    targets: Array
    start: Array

    @property
    def clients(self) -> int:
        """N."""
        return len(self.targets)

    def residuals(self, A: Array) -> Array:
        """``left A_n^T A_n right - C_n (N, d_out, d_in)`` of ``A (N, r, k)``."""
        return np.asarray((self.left @ A.swapaxes(1, 2)) @ (A @ self.right) - self.targets)

    def gradient(self, A: Array) -> Array:
        """``A_n (H_n + H_n^T)`` with ``H_n = left^T residual_n right^T``, of ``A (N, r, k)``."""
        H = self.left.T @ self.residuals(A) @ self.right.T
        return np.asarray(A @ (H + H.swapaxes(1, 2)))

    def loss(self, A: Array) -> float:
        """The mean of the clients' losses at one ``A (r, k)``."""
        residuals = self.residuals(np.broadcast_to(A, (self.clients, *A.shape)))
        return float(0.5 * (residuals**2).sum() / self.clients)


def gram_problem(
    random: np.random.Generator,
    clients: int = 5,
    width: int = 16,
    rank: int = 2,
    spread: float = 0.5,
    start: float = 0.3,
) -> GramProblem:
    """``C_n = (4 / k) left Z^T Z right + spread N(0, 1) / sqrt(k)``, square frames from a QR.

    The common part has a Gram of rank r as its best answer; ``spread`` is how far clients differ.
    """
    left, right = (np.linalg.qr(random.standard_normal((width, width)))[0] for _ in range(2))
    Z = random.standard_normal((rank, width))
    deviations = random.standard_normal((clients, width, width)) / np.sqrt(width)
    return GramProblem(
        left=left,
        right=right,
        targets=(4 / width) * left @ Z.T @ Z @ right + spread * deviations,
        start=start * random.standard_normal((rank, width)),
    )


@dataclass(frozen=True)
class Optimiser:
    """How a client steps.

    Attributes:
        rule: gradient descent, with ``momentum``, or AdamW with (.9, .999) and 1e-8.
        rate: the step size.
        decay: weight decay, decoupled in AdamW and part of the gradient otherwise.
        clip: the largest Frobenius norm of a client's gradient.
        keeps_state: whether moments continue from a client's last round or start from zero.
    """

    rule: Literal["sgd", "adamw"] = "sgd"
    rate: float = 0.02
    momentum: float = 0.0
    decay: float = 0.0
    clip: float = np.inf
    keeps_state: bool = False


@dataclass(frozen=True)
class Moments:
    """What an optimiser remembers of ``A (N, r, k)``: two moments and the steps taken."""

    first: Array
    second: Array
    steps: int = 0


def step(
    A: Array, gradient: Array, moments: Moments, optimiser: Optimiser
) -> tuple[Array, Moments]:
    """One step of all clients."""
    norms = np.linalg.norm(gradient, axis=(1, 2), keepdims=True)
    gradient = gradient * np.minimum(1, optimiser.clip / np.maximum(norms, 1e-300))
    if optimiser.rule == "sgd":
        first = optimiser.momentum * moments.first + gradient + optimiser.decay * A
        return A - optimiser.rate * first, replace(moments, first=first)
    steps = moments.steps + 1
    first = 0.9 * moments.first + 0.1 * gradient
    second = 0.999 * moments.second + 0.001 * gradient**2
    direction = (first / (1 - 0.9**steps)) / (np.sqrt(second / (1 - 0.999**steps)) + 1e-8)
    A = A * (1 - optimiser.rate * optimiser.decay) - optimiser.rate * direction
    return A, Moments(first, second, steps)


Stepper = Callable[[Array, Array, Moments, Optimiser], tuple[Array, Moments]]

Server = Callable[[GramRound], Array]
"""What clients sent, to the factor that they continue from."""


@dataclass(frozen=True)
class GramRun:
    """A federated run.

    Attributes:
        factors: ``A_t (T + 1, r, k)``, what the server broadcasts.
        losses: ``(T + 1,)`` the mean loss at each.
    """

    factors: Array
    losses: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def grams(self) -> Array:
        """``A_t^T A_t (T + 1, k, k)``: the models."""
        return np.asarray(self.factors.swapaxes(1, 2) @ self.factors)

    @property
    def movement(self) -> Array:
        """``||A_{t+1} - A_t||_F (T,)``, the drift that an analysis in A has to bound."""
        return np.asarray(np.linalg.norm(np.diff(self.factors, axis=0), axis=(1, 2)))


def train(
    problem: GramProblem,
    server: Server,
    optimiser: Optimiser,
    rounds: int = 60,
    local_steps: int = 5,
    stepper: Stepper = step,
) -> GramRun:
    """All clients in every round, with equal weights and the whole gradient."""
    shape = (problem.clients, *problem.start.shape)
    weights = np.full(problem.clients, 1 / problem.clients)
    fresh = Moments(np.zeros(shape), np.zeros(shape))
    moments, factors = fresh, [problem.start]
    for _ in range(rounds):
        A = np.broadcast_to(factors[-1], shape)
        moments = moments if optimiser.keeps_state else fresh
        for _ in range(local_steps):
            A, moments = stepper(A, problem.gradient(A), moments, optimiser)
        factors.append(server(GramRound(factors[-1], A, weights)))
    return GramRun(np.stack(factors), np.array([problem.loss(A) for A in factors]))
