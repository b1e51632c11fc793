"""``fedcore::product_norm``. With ``f = ||left^T right||_F``,

    d left = right right^T left / f,    d right = left left^T right / f

through Grams of m rows. At f = 0 the norm has no derivative; its subgradient of least norm, zero,
is returned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.dispatch import run
from fedcore_kernels.library.operation import Gradient, Promise, define


def _norm(left: Tensor, right: Tensor) -> Tensor:
    norm: Tensor = run("product_norm", (left, right))
    return norm


def _promise(left: Tensor, right: Tensor) -> list[Promise]:
    return [(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), torch.float64)]


def _keep(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context.save_for_backward(*inputs, output)


def _backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    left, right, norm = context.saved_tensors
    first, second = left.double(), right.double()
    scale = torch.where(norm > 0, grad / torch.where(norm > 0, norm, 1.0), 0.0)[..., None, None]
    to_left = scale * ((second @ second.mT) @ first)
    to_right = scale * ((first @ first.mT) @ second)
    return (
        to_left.sum_to_size(left.shape).to(left.dtype),
        to_right.sum_to_size(right.shape).to(right.dtype),
    )


define(
    "product_norm(Tensor left, Tensor right) -> Tensor",
    _norm,
    _promise,
    Gradient(("left", "right"), _backward, _keep),
)
