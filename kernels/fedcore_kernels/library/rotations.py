"""``fedcore::soft_rotation``, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels.dispatch import run
from fedcore_kernels.library.operation import Promise, define


def _rotation(matrix: Tensor, strength: float, eps_rel: float) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = run("soft_rotation", (matrix,), strength, eps_rel)
    return result


def _rotation_promise(matrix: Tensor, strength: float, eps_rel: float) -> list[Promise]:
    batch = matrix.shape[:-2]
    return [(matrix.shape, torch.float64), (batch, torch.int64), (batch, torch.bool)]


define(
    "soft_rotation(Tensor matrix, float strength, float eps_rel) -> (Tensor, Tensor, Tensor)",
    _rotation,
    _rotation_promise,
)
