"""Tri-factor regression by clients whose targets have a common and a private part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedcore_theory.models.tri_factors import TriClients
from fedcore_theory.rounds import Array

CLIENTS, WIDTH, RANK, EXAMPLES = 10, 24, 4, 24

NOISE = 0.3
"""Standard deviation of what no client can learn, in each output."""


@dataclass(frozen=True)
class Regression:
    """``y = W_n x + noise`` on every client.

    Attributes:
        targets: ``(N, d, d)``, the ``W_n``.
        inputs: ``(N, m, d)`` standard normal.
        outputs: ``(N, m, d)``.
        start: ``A`` common and Gaussian, ``B = 0``, ``R = I``.
    """

    targets: Array
    inputs: Array
    outputs: Array
    start: TriClients

    def gradients(self, factors: TriClients) -> tuple[Array, Array, Array]:
        """Of each client's ``1/m sum ||B R A x - y||^2`` by ``A``, ``R`` and ``B``."""
        A, R, B = factors.A, factors.R, factors.B
        miss = self.inputs @ _turned(factors.products) - self.outputs
        g = 2 / EXAMPLES * _turned(miss) @ self.inputs
        return _turned(B @ R) @ g, _turned(B) @ g @ _turned(A), g @ _turned(R @ A)

    def common_bases(self) -> TriClients:
        """The leading singular vectors of the clients' mean gradient at zero, with ``R = 0``."""
        gradient = np.einsum("nmo,nmi->oi", self.outputs, self.inputs)
        u, _, vt = np.linalg.svd(gradient)
        return TriClients(
            A=np.repeat(vt[None, :RANK], CLIENTS, 0),
            R=np.zeros((CLIENTS, RANK, RANK)),
            B=np.repeat(u[None, :, :RANK], CLIENTS, 0),
            weights=self.start.weights,
        )

    def error(self, factors: TriClients) -> float:
        """The mean over clients of ``||B R A - W_n||^2 / ||W_n||^2``: excess risk, as a share."""
        miss = ((factors.products - self.targets) ** 2).sum((1, 2))
        return float(np.mean(miss / (self.targets**2).sum((1, 2))))


def core_regression(seed: int, private: float) -> Regression:
    """Targets of rank 4 in common, plus ``private`` times ones of rank 2 of the same size."""
    random = np.random.default_rng(seed)
    common = _low_rank(random, 1, RANK)
    targets = common + private * _low_rank(random, CLIENTS, 2)
    inputs = random.standard_normal((CLIENTS, EXAMPLES, WIDTH))
    noise = NOISE * random.standard_normal((CLIENTS, EXAMPLES, WIDTH))
    A = random.standard_normal((RANK, WIDTH)) / np.sqrt(WIDTH)
    start = TriClients(
        A=np.repeat(A[None], CLIENTS, 0),
        R=np.repeat(np.eye(RANK)[None], CLIENTS, 0),
        B=np.zeros((CLIENTS, WIDTH, RANK)),
        weights=np.full(CLIENTS, 1 / CLIENTS),
    )
    return Regression(targets, inputs, inputs @ _turned(targets) + noise, start)


def _low_rank(random: np.random.Generator, count: int, rank: int) -> Array:
    left = random.standard_normal((count, WIDTH, rank))
    right = random.standard_normal((count, rank, WIDTH))
    return np.asarray(left @ right / np.sqrt(WIDTH * rank))


def _turned(stack: Array) -> Array:
    return stack.transpose(0, 2, 1)
