"""Orthogonal Procrustes one matrix after the other, by ``scipy.linalg.orthogonal_procrustes``."""

from __future__ import annotations

import numpy as np
from scipy.linalg import orthogonal_procrustes


def scipy_procrustes(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The matrices ``O`` (n, p, p) that carry sources (n, p, k) to targets (n, p, k)."""
    pairs = zip(sources, targets, strict=True)
    # SciPy multiplies from the right: it looks for the transpose, on transposed matrices.
    return np.stack([orthogonal_procrustes(source.T, target.T)[0].T for source, target in pairs])


def scipy_polar(matrices: np.ndarray) -> np.ndarray:
    """Orthogonal polar factors of matrices (n, p, p): Procrustes from the identity."""
    identity = np.eye(matrices.shape[-1], dtype=matrices.dtype)
    return scipy_procrustes(np.broadcast_to(identity, matrices.shape), matrices)
