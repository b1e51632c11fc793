"""FLoRG's steps for one module in 60-digit arithmetic, where fp64 is not a judge of itself."""

from __future__ import annotations

from typing import Any

import mpmath
from torch import Tensor

DIGITS = 60


def _matrix(values: Tensor) -> Any:
    return mpmath.matrix(values.double().tolist())


def _stacked(clients: Tensor, weights: Tensor) -> Any:
    shares = [mpmath.mpf(w) for w in weights.tolist()]
    total = sum(shares)
    rows = [
        [mpmath.sqrt(share / total) * mpmath.mpf(entry) for entry in row]
        for share, client in zip(shares, clients.tolist(), strict=True)
        for row in client
    ]
    return mpmath.matrix(rows)


def _polar(matrix: Any) -> Any:
    values, vectors = mpmath.eigsy(matrix * matrix.T)
    root = vectors * mpmath.diag([1 / mpmath.sqrt(value) for value in values]) * vectors.T
    return root * matrix


def sketched(clients: Tensor, weights: Tensor, previous: Tensor) -> Any:
    """``polar(A_prev F^T) F`` of clients (N, r, k)."""
    with mpmath.workdps(DIGITS):
        rows = _stacked(clients, weights)
        return _polar(_matrix(previous) * rows.T) * rows


def truncated(clients: Tensor, weights: Tensor, previous: Tensor, rank: int) -> Any:
    """``polar(A_prev Til^T) Til`` of clients (N, r, k)."""
    with mpmath.workdps(DIGITS):
        rows = _stacked(clients, weights)
        _, vectors = mpmath.eigsy(rows * rows.T)
        til = vectors[:, vectors.cols - rank :].T * rows
        return _polar(_matrix(previous) * til.T) * til


def weakest_direction_error(actual: Tensor, expected: Any) -> float:
    """``||u^T (actual - expected)|| / sigma`` for the smallest singular pair of ``expected``."""
    with mpmath.workdps(DIGITS):
        left, values, _ = mpmath.svd_r(expected)
        last = expected.rows - 1
        error = left[:, last].T * (_matrix(actual) - expected)
        return float(mpmath.norm(error) / values[last])
