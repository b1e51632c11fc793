"""``fedcore::weighted_mean``, and ``client_shares`` for means that are made of other operations.

The gradient of client n's row is its share of the gradient of the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.checks import accumulator
from fedcore_kernels.client_weights import normalised, shares
from fedcore_kernels.dispatch import run
from fedcore_kernels.library.operation import Gradient, Promise, define


def _mean(updates: Tensor, weights: Tensor) -> Tensor:
    mean: Tensor = run("weighted_mean", (updates, shares(weights, updates)))
    return mean


def _promise(updates: Tensor, weights: Tensor) -> list[Promise]:
    return [(updates.shape[1:], accumulator(updates.dtype))]


def _keep(context: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
    # The gradient is linear in the rows, so a round's uploads need not be kept.
    updates, weights = inputs
    context.save_for_backward(weights)
    context.dtype = updates.dtype


def _backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
    (weights,) = context.saved_tensors
    portion = normalised(weights).to(grad.device, grad.dtype)
    return (portion[:, None] * grad).to(context.dtype), None


def _shares(uploads: Tensor, weights: Tensor) -> Tensor:
    return shares(weights, uploads).to(uploads.device)


def _shares_promise(uploads: Tensor, weights: Tensor) -> list[Promise]:
    return [(weights.shape, torch.float64)]


define("client_shares(Tensor uploads, Tensor weights) -> Tensor", _shares, _shares_promise)
define(
    "weighted_mean(Tensor updates, Tensor weights) -> Tensor",
    _mean,
    _promise,
    Gradient(("updates",), _backward, _keep),
)
