"""A low-rank layer and a fixed head on scikit-learn's digits, trained by clients side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcore.methods import create_method
from fedcore_theory.rounds import Array, Round, server_round

TRAINED, CLASSES, WIDTH, RANK = 1400, 10, 64, 4

Server = Callable[[str, dict[str, Array], dict[str, Array], int], Round]
"""Method, the clients' factors, those they started from and the round, to the server's result."""


@dataclass(frozen=True)
class Digits:
    """Several federations side by side, each with its own split and start.

    Attributes:
        inputs: ``(S, N, m, 64)`` standardised pixels of S federations of N clients.
        labels: ``(S, N, m, 10)`` one-hot; no label is on two clients.
        test_inputs: ``(S, n, 64)``.
        test_labels: ``(S, n)`` integers.
        A: ``(S, r, 64)`` at the start, entries of variance 1/64; B starts at zero.
        head: ``(S, 64, 10)`` fixed, entries of variance 1/64.
    """

    inputs: Array
    labels: Array
    test_inputs: Array
    test_labels: NDArray[np.int64]
    A: Array
    head: Array


class Trained(NamedTuple):
    """``accuracy (rounds, S)`` on test digits, and the last ``A (S, r, 64)``, ``B (S, 64, r)``."""

    accuracy: Array
    A: Array
    B: Array


def split_digits(seed: int, clients: int, federations: int) -> Digits:
    """1,400 digits in training; client c of N has the labels from ``10 c / N`` on, equally many."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    parts = []
    for federation in range(federations):
        random = np.random.default_rng((seed, federation))
        order = random.permutation(len(labels))
        chosen, rest = order[:TRAINED], order[TRAINED:]
        # A tenth of the range of greys, so that pixels that are always white stay finite.
        centre, spread = pixels[chosen].mean(0), pixels[chosen].std(0) + 1.6
        scaled = (pixels - centre) / spread
        by_client = [chosen[labels[chosen] * clients // CLASSES == c] for c in range(clients)]
        picks = np.stack([places[: min(map(len, by_client))] for places in by_client])
        A = random.standard_normal((RANK, WIDTH)) / np.sqrt(WIDTH)
        head = random.standard_normal((WIDTH, CLASSES)) / np.sqrt(WIDTH)
        parts.append((scaled, picks, rest, A, head))
    # Federations draw other digits, so the smallest client of all sets the common size.
    size = min(picks.shape[1] for _, picks, *_ in parts)
    return Digits(
        inputs=np.stack([scaled[picks[:, :size]] for scaled, picks, *_ in parts]),
        labels=np.stack([np.eye(CLASSES)[labels[picks[:, :size]]] for _, picks, *_ in parts]),
        test_inputs=np.stack([scaled[rest] for scaled, _, rest, *_ in parts]),
        test_labels=np.stack([labels[rest] for _, _, rest, *_ in parts]),
        A=np.stack([part[3] for part in parts]),
        head=np.stack([part[4] for part in parts]),
    )


def shipped(method: str, uploads: dict[str, Array], start: dict[str, Array], round: int) -> Round:
    """The round of a method, clients counting alike."""
    return server_round(method, uploads, previous=start, round=round)


def train(
    digits: Digits,
    method: str,
    rate: float,
    rounds: int,
    *,
    epochs: int = 5,
    batch: int = 64,
    slope_at_zero: bool = True,
    server: Server = shipped,
) -> Trained:
    """``relu((x A^T) B^T) head`` under cross-entropy; the factors that train are the method's.

    Args:
        slope_at_zero: whether the ReLU's derivative is 1 where its argument is 0, as everywhere at
            B = 0; else it is 0 there.
    """
    random = np.random.default_rng(0)
    count, clients, size, _ = digits.inputs.shape
    A, B = digits.A, np.zeros((count, WIDTH, RANK))
    accuracy = []
    for round in range(rounds):
        trains = create_method(method).plan(round).trains
        own_A, own_B = (np.repeat(factor[:, None], clients, 1) for factor in (A, B))
        for _ in range(epochs):
            order = random.permutation(size)
            for first in range(0, size, batch):
                places = order[first : first + batch]
                x, y = digits.inputs[:, :, places], digits.labels[:, :, places]
                hidden = x @ _turned(own_A)
                back = _backward(hidden @ _turned(own_B), y, digits.head[:, None], slope_at_zero)
                step_A = _turned(back @ own_B) @ x if "A" in trains else 0.0
                step_B = _turned(back) @ hidden if "B" in trains else 0.0
                own_A, own_B = own_A - rate * step_A, own_B - rate * step_B
        results = [
            server(method, {"A": own_A[s], "B": own_B[s]}, {"A": A[s], "B": B[s]}, round).factors
            for s in range(count)
        ]
        A, B = (np.stack([one[name] for one in results]) for name in "AB")
        scores = np.maximum(digits.test_inputs @ _turned(A) @ _turned(B), 0) @ digits.head
        accuracy.append((scores.argmax(-1) == digits.test_labels).mean(-1))
    return Trained(np.array(accuracy), A, B)


def _backward(before: Array, y: Array, head: Array, slope_at_zero: bool) -> Array:
    """Of the mean cross-entropy of a batch, by the arguments ``before`` of the ReLU."""
    sloped = before >= 0 if slope_at_zero else before > 0
    scores = (before * sloped) @ head
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.asarray(sloped * ((shares - y) @ _turned(head)) / before.shape[-2])


def _turned(stack: Array) -> Array:
    return np.swapaxes(stack, -1, -2)
