"""Distances between clients' class mixtures as a loop of exact programs, one after the other.

Written from the description in arXiv 2503.23869: ``ot.emd2`` between the components of every pair
of classes, then between the classes of every pair of clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ot
from numpy.typing import NDArray

from fedcore.methods.tri.ce_lora.class_mixtures import ClassMixtures


def looped_transport(clients: Sequence[ClassMixtures], pairs: int | None = None) -> NDArray:
    """``D^2 (N, N)``; if ``pairs`` is set, of the first ``pairs`` only, the others stay zero."""
    distances = np.zeros((len(clients), len(clients)))
    first, second = np.triu_indices(len(clients), 1)
    for i, j in list(zip(first, second, strict=True))[:pairs]:
        distances[i, j] = distances[j, i] = _distance(clients[i], clients[j])
    return distances


def _distance(one: ClassMixtures, other: ClassMixtures) -> float:
    costs = np.zeros((len(one.sizes), len(other.sizes)))
    for c, (mass, mean, deviation) in enumerate(_classes(one)):
        for d, (other_mass, other_mean, other_deviation) in enumerate(_classes(other)):
            between = ot.dist(mean, other_mean) + ot.dist(deviation, other_deviation)
            costs[c, d] = ot.emd2(mass, other_mass, between)
    return float(ot.emd2(one.shares, other.shares, costs))


def _classes(client: ClassMixtures) -> list[tuple[NDArray, NDArray, NDArray]]:
    ends = np.cumsum(client.sizes)
    return [
        (client.weights[e - s : e], client.means[e - s : e], client.deviations[e - s : e])
        for e, s in zip(ends, client.sizes, strict=True)
    ]
