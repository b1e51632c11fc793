"""General-purpose descents of FLoRA-NA's objective, from the means, many modules at once.

``p, q (L, S, N)`` are coefficients of modules L from S starts or at S step sizes. Every function
returns ``f`` of each module before the first step and after each, ``(L,)`` an entry.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from fedcore.methods.lora.flora_na.objective import PairObjective, apply
from fedcore_theory.rounds import Array

Point = tuple[Tensor, Tensor]

RATES = (1e-3, 1e-2, 1e-1)
"""Of Adam; the best of them counts at every step."""


def means(objective: PairObjective, width: int = 1) -> Tensor:
    """FedAvg's coefficients ``(L, width, N)``, of either side."""
    return objective.shares.expand(len(objective.cross), width, -1).clone()


def gradients(objective: PairObjective, p: Tensor, q: Tensor) -> Point:
    """``2 (R(q) p - H q)`` and ``2 (T(p) q - H^T p)``."""
    left = apply(objective.left_curvature(q), p) - q @ objective.cross.mT
    right = apply(objective.right_curvature(p), q) - p @ objective.cross
    return 2 * left, 2 * right


def adam(objective: PairObjective, steps: int) -> list[Array]:
    """Adam with betas 0.9 and 0.999, at the rate that is best so far."""
    rates = torch.tensor(RATES, dtype=torch.float64)
    at = torch.stack([means(objective, len(RATES))] * 2)
    mean, square = torch.zeros_like(at), torch.zeros_like(at)
    values = [objective.value(*at)]
    for step in range(1, steps + 1):
        slope = torch.stack(gradients(objective, *at))
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope.square()
        size = (square / (1 - 0.999**step)).sqrt() + 1e-8
        at = at - rates[:, None] * (mean / (1 - 0.9**step)) / size
        values.append(objective.value(*at))
    return [value.amin(-1).numpy() for value in values]


def gradient_descent(objective: PairObjective, steps: int) -> list[Array]:
    """Steps of ``1 / (4 L)``, L the larger side's curvature at the means."""
    p = q = means(objective)
    sides = objective.left_curvature(q), objective.right_curvature(p)
    largest = torch.maximum(*(torch.linalg.matrix_norm(side, 2) for side in sides))[..., None]
    rate = 1 / (4 * largest)
    values = [column(objective.value(p, q))]
    for _ in range(steps):
        slope_p, slope_q = gradients(objective, p, q)
        p, q = p - rate * slope_p, q - rate * slope_q
        values.append(column(objective.value(p, q)))
    return values


def lbfgs(objective: PairObjective, steps: int) -> list[Array]:
    """SciPy's L-BFGS, a step an iteration; a module that has ended keeps its value."""
    paths = [
        _one_lbfgs(objective.select(torch.tensor([n])), steps) for n in range(len(objective.cross))
    ]
    longest = max(map(len, paths))
    padded = [path + [path[-1]] * (longest - len(path)) for path in paths]
    return list(np.array(padded).T)


def _one_lbfgs(objective: PairObjective, steps: int) -> list[float]:
    clients = len(objective.shares)
    size = float(objective.target)

    def evaluate(flat: Array) -> tuple[float, Array]:
        p, q = torch.from_numpy(flat).view(2, 1, 1, clients)
        slopes = torch.cat([side.flatten() for side in gradients(objective, p, q)])
        return float(objective.value(p, q)) / size, slopes.numpy() / size

    path: list[float] = []
    start = np.concatenate([objective.shares.numpy()] * 2)
    path.append(evaluate(start)[0] * size)

    def follow(intermediate_result: OptimizeResult) -> None:
        path.append(float(intermediate_result.fun) * size)

    options = {"maxiter": steps, "ftol": 1e-15, "gtol": 1e-12}
    minimize(evaluate, start, jac=True, method="L-BFGS-B", callback=follow, options=options)
    return path


def column(value: Tensor) -> Array:
    """``(L,)`` of ``(L, 1)``."""
    return np.asarray(value[:, 0].numpy())
