"""How alike the cores of clients are, averaged over the adapted modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cosine_similarity(moves: Sequence[Tensor]) -> Tensor:
    """The mean over modules of ``<X_i, X_j> / (||X_i|| ||X_j||)``.

    A module that did not move says nothing: two that are both zero agree (1), one that is and one
    that is not have nothing in common (0).

    Args:
        moves: ``(N, L, r, r)`` for each group of modules of one rank: what training changed,
            ``R - I`` or the difference to the last mean. On ``R`` itself, which stays near the
            identity, everybody would look alike.

    Returns:
        ``(N, N)`` fp64 in [-1, 1] up to rounding, one on the diagonal.
    """
    return _mean_over_modules([_cosines(x.double().flatten(2).transpose(0, 1)) for x in moves])


def cka_similarity(cores: Sequence[Tensor]) -> Tensor:
    """The mean over modules of linear CKA, ``||X_j^T X_i||^2 / (||X_i^T X_i|| ||X_j^T X_j||)``.

    Warning: CKA of cores tells little. It does not see scale, sign and rotations from the right,
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


def _cosines(vectors: Tensor) -> Tensor:
    """``(L, N, N)`` of vectors ``(L, N, n)``."""
    # Scaled by the largest entry first, so that tiny moves do not underflow when squared.
    largest = vectors.abs().amax(-1, keepdim=True)
    still = largest[..., 0] == 0
    scaled = vectors / torch.where(largest == 0, 1.0, largest)
    unit = scaled / torch.where(still[..., None], 1.0, scaled.norm(dim=-1, keepdim=True))
    found = unit @ unit.mT
    found[still[:, :, None] & still[:, None, :]] = 1.0
    found.diagonal(dim1=1, dim2=2).fill_(1.0)
    return found


def _mean_over_modules(groups: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(groups)).mean(0)
