"""How similar clients are: by the mixtures that describe their data, and by their models' cores.

*Data.* Optimal transport three times over: between Gaussians, between the mixtures of two classes,
between the classes of two clients,

    W2^2(g, g')   = ||mean - mean'||^2 + ||deviation - deviation'||^2     (diagonal covariances)
    MW2^2(c, c')  = OT(weights, weights', W2^2)
    D^2_ij        = OT(class shares, class shares', MW2^2)

all exact. Labels are not compared, so clients without a class in common have a distance too.
``D`` is a metric: zero for equal mixtures in any order, symmetric, with the triangle inequality.
MW2 is due to Delon and Desolneux, arXiv 1907.05254.

*Models.* The mean over modules of the cosine of what training changed, or of linear CKA.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.methods.tri.ce_lora.class_mixtures import ClassMixtures
from fedcore.methods.tri.ce_lora.optimal_transport import Array, transport_costs

# Below this ratio of a distance to the norms behind it, it is summed from the differences.
_NEAR = 1e-6

# Differences that are formed at a time.
_BATCH = 1024


def _cosines(vectors: Tensor) -> Tensor:
    """``(L, N, N)`` of vectors ``(L, N, n)``."""
    # Scaled by the largest entry first, so that tiny moves do not underflow when squared.
    largest = vectors.abs().amax(-1, keepdim=True)
    still = largest[..., 0] == 0
    scaled = vectors / torch.where(largest == 0, 1.0, largest)
    unit = scaled / torch.where(still[..., None], 1.0, scaled.norm(dim=-1, keepdim=True))
    cosines = unit @ unit.mT
    cosines[still[:, :, None] & still[:, None, :]] = 1.0
    cosines.diagonal(dim1=1, dim2=2).fill_(1.0)
    return cosines


def _mean_over_modules(groups: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(groups)).mean(0)


def component_distances(means: Array, deviations: Array) -> Array:
    """``W2^2`` between all Gaussians with diagonal covariances.

    Args:
        means, deviations: ``(T, D)``; standard deviations, not variances.

    Returns:
        ``(T, T)`` symmetric, zero for equal Gaussians and nowhere negative. One product of
        matrices; pairs that are so near that it would cancel are computed from their differences.

    Example:
        >>> component_distances(np.array([[0.0], [3.0]]), np.array([[1.0], [5.0]]))
        array([[ 0., 25.],
               [25.,  0.]])
    """
    points = np.concatenate([means, deviations], axis=1)
    centred = points - points.mean(axis=0)
    products = centred @ centred.T
    norms = products.diagonal()
    scale = norms[:, None] + norms
    distances = scale - 2 * products
    first, second = np.nonzero(np.triu(distances <= _NEAR * scale))
    for start in range(0, len(first), _BATCH):
        i, j = first[start : start + _BATCH], second[start : start + _BATCH]
        distances[i, j] = distances[j, i] = np.square(points[i] - points[j]).sum(axis=1)
    return distances


def group_distances(costs: Array, masses: Array, sizes: NDArray[np.int64]) -> Array:
    """The transport cost between all groups of consecutive atoms.

    Args:
        costs: ``(T, T)`` symmetric, between atoms, zero on the diagonal.
        masses: ``(T,)`` summing to one in each group.
        sizes: number of atoms of each of the n groups, from 1, summing to T.

    Returns:
        ``(n, n)`` symmetric, zero on the diagonal.
    """
    n, widest = len(sizes), int(sizes.max())
    offsets = np.cumsum(sizes) - sizes
    # Groups are padded with their own first atom, without mass.
    there = np.arange(widest) < sizes[:, None]
    atoms = offsets[:, None] + np.where(there, np.arange(widest), 0)
    padded = np.where(there, masses[atoms], 0.0)
    first, second = np.triu_indices(n, 1)
    between = costs[atoms[first][:, :, None], atoms[second][:, None, :]]
    distances = np.zeros((n, n))
    distances[first, second] = transport_costs(padded[first], padded[second], between)
    return distances + distances.T


def client_distances(mixtures: Sequence[ClassMixtures]) -> Array:
    """``D^2 (N, N)`` between the clients' data; all must be of one feature dimension."""
    means, deviations, weights, shares, sizes = (
        np.concatenate([getattr(client, name) for client in mixtures])
        for name in ("means", "deviations", "weights", "shares", "sizes")
    )
    classes = np.array([len(client.sizes) for client in mixtures])
    between_classes = group_distances(component_distances(means, deviations), weights, sizes)
    return group_distances(between_classes, shares, classes)


def data_similarity(distances: Array) -> Array:
    """``S = exp(-D^2 / tau)`` with ``tau`` the median of ``D^2`` over pairs, 1 if that is zero.

    Args:
        distances: ``(N, N)`` squared distances, symmetric, zero on the diagonal.

    Returns:
        ``(N, N)`` in [0, 1], one on the diagonal.

    Example:
        >>> data_similarity(np.array([[0.0, 2.0], [2.0, 0.0]])).round(3)
        array([[1.   , 0.368],
               [0.368, 1.   ]])
    """
    pairs = distances[np.triu_indices(len(distances), 1)]
    scale = float(np.median(pairs)) if len(pairs) else 0.0
    return np.asarray(np.exp(-distances / (scale or 1.0)))


def cosine_similarity(moves: Sequence[Tensor]) -> Tensor:
    """The mean over modules of ``<X_i, X_j> / (||X_i|| ||X_j||)``.

    A module that did not move says nothing: two that are both zero agree (1), one that is and one
    that is not have nothing in common (0).

    Args:
        moves: ``(N, L, r, r)`` for each group of modules of one rank: what training changed,
            ``R - I`` or the difference to the last mean. On ``R`` itself, which stays near the
            identity, all clients would look the same.

    Returns:
        ``(N, N)`` fp64 in [-1, 1] up to rounding, one on the diagonal.
    """
    return _mean_over_modules([_cosines(x.double().flatten(2).transpose(0, 1)) for x in moves])


def cka_similarity(cores: Sequence[Tensor]) -> Tensor:
    """The mean over modules of linear CKA, ``||X_j^T X_i||^2 / (||X_i^T X_i|| ||X_j^T X_j||)``.

    Warning: CKA of cores says little. It does not see scale, sign and rotations from the right,
    so that a client and its opposite count as equal, and near the identity it is saturated: two
    unrelated ``I + 0.1 noise`` of size 8 have 0.87 on average, unrelated 8 x 8 noise 0.49.

    Args:
        cores: ``(N, L, r, r)`` for each group of modules of one rank: ``R`` itself.

    Returns:
        ``(N, N)`` fp64 in [0, 1] up to rounding, one on the diagonal.
    """
    # ||X_j^T X_i||^2 = <X_i X_i^T, X_j X_j^T>: the cosine of the Grams.
    grams = [x.double() @ x.double().mT for x in cores]
    return _mean_over_modules([_cosines(x.flatten(2).transpose(0, 1)) for x in grams])
