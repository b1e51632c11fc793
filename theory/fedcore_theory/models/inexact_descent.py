"""Gradient descent on a diagonal quadratic with noise and an error of bounded norm in each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedcore_theory.rounds import Array


@dataclass(frozen=True)
class Quadratic:
    """``F(x) = sum_i h_i x_i^2 / 2`` and what disturbs its gradient.

    Attributes:
        curvatures: ``(d,)`` ``h``; a curvature may be 0.
        start: ``(d,)``.
        noise: ``sig``: ``E ||xi||^2 = sig^2``, isotropic Gaussian.
        runs: how many are averaged.
        seed: of the noise, which is the same for every error.
    """

    curvatures: Array
    start: Array
    noise: float
    runs: int
    seed: int

    @property
    def gap(self) -> float:
        """``F(start) - min F``."""
        return float(self.curvatures @ self.start**2) / 2


Error = Callable[[Array, Array, int], Array]
"""Gradients and points ``(runs, d)`` and the step's number to the errors ``(runs, d)``."""

Step = Callable[[Array, Array, Array, Array, float], Array]
"""Points, gradients, noise and errors, all ``(runs, d)``, and eta to the next points."""


class Path(NamedTuple):
    """Means over the runs before every step; ``gaps`` has one more, after the last.

    ``gradients (T,)`` are squared norms, ``gaps (T + 1,)`` are ``F - min F``.
    """

    gradients: Array
    gaps: Array


def step(x: Array, gradient: Array, noise: Array, error: Array, eta: float) -> Array:
    """``x - eta (gradient + noise) + error``."""
    return x - eta * (gradient + noise) + error


def descend(loss: Quadratic, eta: float, steps: int, error: Error, advance: Step = step) -> Path:
    """``steps`` steps from the start, all runs at once."""
    h, d = loss.curvatures, len(loss.curvatures)
    random = np.random.default_rng(loss.seed)
    x = np.repeat(loss.start[None], loss.runs, axis=0)
    squared, gaps = np.empty(steps), np.empty(steps + 1)
    for t in range(steps):
        gradient = x * h
        squared[t], gaps[t] = np.square(gradient).sum(1).mean(), (x * gradient).sum(1).mean() / 2
        noise = random.standard_normal((loss.runs, d)) * (loss.noise / np.sqrt(d))
        x = advance(x, gradient, noise, error(gradient, x, t), eta)
    gaps[steps] = (h * x**2).sum(1).mean() / 2
    return Path(squared, gaps)


def uphill(rho: float) -> Error:
    """``rho`` along the gradient: what raises F fastest."""

    def error(gradient: Array, x: Array, t: int) -> Array:
        norms = np.linalg.norm(gradient, axis=1, keepdims=True)
        return rho * gradient / np.where(norms > 0, norms, 1.0)

    return error


def along(rho: float, direction: int) -> Error:
    """``rho`` along one axis in every step."""

    def error(gradient: Array, x: Array, t: int) -> Array:
        shift = np.zeros_like(x)
        shift[:, direction] = rho
        return shift

    return error


def to_and_fro(rho: float, direction: int) -> Error:
    """``rho`` along one axis, with a sign that changes from step to step."""

    def error(gradient: Array, x: Array, t: int) -> Array:
        return along(rho * (-1) ** t, direction)(gradient, x, t)

    return error


def anywhere(rho: float, seed: int) -> Error:
    """``rho`` in a direction that is drawn anew for every step."""
    random = np.random.default_rng(seed)

    def error(gradient: Array, x: Array, t: int) -> Array:
        drawn = random.standard_normal(x.shape)
        return rho * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    return error
