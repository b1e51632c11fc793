"""FLoRG's server step as published: a k x k Gram, its eigenvectors, rectangular Procrustes.

Reference: FLoRG, arXiv 2602.17095. Written from the description, one module at a time, in the dtype
of the uploads; there is no code by the authors to take it from.
"""

from __future__ import annotations

import torch
from torch import Tensor


def published_florg(clients: Tensor, weights: Tensor, previous: Tensor) -> Tensor:
    """The next factor (r, k) of one module, from clients (N, r, k) and the previous factor."""
    shares = (weights / weights.sum()).to(clients.dtype)
    width = clients.shape[-1]
    gram = clients.new_zeros(width, width)
    for share, client in zip(shares, clients, strict=True):
        gram += share * (client.T @ client)
    values, vectors = torch.linalg.eigh(gram)
    rank = min(width, clients.shape[0] * clients.shape[1])
    root = values[-rank:].clamp(min=0).sqrt()[:, None] * vectors[:, -rank:].T
    left, _, right = torch.linalg.svd(previous @ root.T, full_matrices=False)
    return left @ right @ root
