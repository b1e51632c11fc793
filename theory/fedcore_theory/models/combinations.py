"""FLoRA-NA's objective of NumPy factors: the shipped Gram form, and its dense definition."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fedcore.methods.lora.flora_na.objective import PairObjective
from fedcore.methods.lora.flora_na.solver import nearest_combination
from fedcore_kernels import block_grams
from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.rounds import Array


class Coefficients(NamedTuple):
    """``p`` of the clients' B and ``q`` of their A, each ``(N,)``."""

    p: Array
    q: Array


def pair_objective(*rounds: ClientFactors) -> PairObjective:
    """``f`` of one or more rounds as modules (L); they share the first one's weights."""
    left = torch.from_numpy(np.stack([one.B.transpose(0, 2, 1) for one in rounds], axis=1))
    right = torch.from_numpy(np.stack([one.A for one in rounds], axis=1))
    weights = torch.from_numpy(rounds[0].weights)
    return PairObjective.build(
        block_grams(left.contiguous()), block_grams(right.contiguous()), weights
    )


def nearest(
    clients: ClientFactors, *, tolerance: float = 1e-10, affine: bool = False
) -> Coefficients:
    """The coefficients that the shipped solver finds, by default with its default options."""
    fit = nearest_combination(pair_objective(clients), tolerance=tolerance, affine=affine)
    return Coefficients(fit.p[0].numpy(), fit.q[0].numpy())


def combined(clients: ClientFactors, point: Coefficients) -> Array:
    """``(sum_n p_n B_n) (sum_n q_n A_n)``."""
    B, A = np.tensordot(point.p, clients.B, 1), np.tensordot(point.q, clients.A, 1)
    return np.asarray(B @ A)


def squared_error(clients: ClientFactors, point: Coefficients) -> float:
    """``f(p, q) = ||M - (sum_n p_n B_n) (sum_n q_n A_n)||_F^2``, formed entry by entry."""
    return float(np.square(clients.mean_product - combined(clients, point)).sum())


def squared_size(clients: ClientFactors) -> float:
    """``||M||_F^2``."""
    return float(np.square(clients.mean_product).sum())


def tail(clients: ClientFactors) -> float:
    """``||M - M_r||_F``, the error of the best product of the clients' rank."""
    values = np.linalg.svd(clients.mean_product, compute_uv=False)
    return float(np.linalg.norm(values[clients.A.shape[1] :]))


def start(objective: PairObjective, point: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
    """``point`` as the one start ``p, q (1, 1, N)`` of an objective of one module."""
    return torch.from_numpy(point.p)[None, None], torch.from_numpy(point.q)[None, None]
