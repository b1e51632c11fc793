"""A quadratic loss of one Gram adapter, and its gradient in the two forms that are computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedcore_theory.rounds import Array


@dataclass(frozen=True)
class GramQuadratic:
    """``F(A) = 1/2 ||s left A^T A right - C||_F^2``.

    Attributes:
        left: ``(d_out, k)``, orthonormal columns.
        right: ``(k, d_in)``, orthonormal rows.
        target: ``C (d_out, d_in)``.
        scale: ``s``.
    """

    left: Array
    right: Array
    target: Array
    scale: float = 1.0

    def residual(self, A: Array) -> Array:
        """The gradient of F in the weight, ``s left A^T A right - C (d_out, d_in)``."""
        return np.asarray(self.scale * self.left @ (A.T @ A) @ self.right - self.target)

    def loss(self, A: Array) -> float:
        """``F(A)``."""
        return 0.5 * float((self.residual(A) ** 2).sum())

    def gradient(self, A: Array) -> Array:
        """``grad F(A) (r, k)``."""
        return gram_gradient(self, A)


def gram_gradient(problem: GramQuadratic, A: Array) -> Array:
    """``s A (H + H^T)`` with ``H = left^T G right^T (k, k)`` and the weight's gradient G."""
    H = problem.left.T @ problem.residual(A) @ problem.right.T
    return np.asarray(problem.scale * A @ (H + H.T))


def gram_gradient_from_batch(
    problem: GramQuadratic, A: Array, inputs: Array, output_gradients: Array
) -> Array:
    """``s (V_A^T X + X_A^T V)`` without forming any k x k matrix.

    ``X = x right^T`` and ``V = g left`` are the inputs ``x (b, d_in)`` and output gradients
    ``g (b, d_out)`` between the frames, ``(b, k)``; ``X_A = X A^T`` and ``V_A = V A^T``. It is
    :func:`gram_gradient` where ``g^T x`` is the weight's gradient.
    """
    X, V = inputs @ problem.right.T, output_gradients @ problem.left
    return np.asarray(problem.scale * ((V @ A.T).T @ X + (X @ A.T).T @ V))


def orthonormal_columns(random: np.random.Generator, rows: int, columns: int) -> Array:
    """Orthonormal columns ``(rows, columns)`` of a Gaussian matrix."""
    return np.asarray(np.linalg.qr(random.standard_normal((rows, columns)))[0])
