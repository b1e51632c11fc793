"""``fedcore::whitened_basis``, ``_upload``, ``_sum`` and ``_step``; the upload has a gradient.

With ``Z = V A^T A`` and its gradient H,

    dA = A (V^T H + H^T V),    dV = H A^T A

and neither k x k matrix is formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.checks import accumulator
from fedcore_kernels.client_weights import root_shares
from fedcore_kernels.dispatch import run
from fedcore_kernels.library.florg_steps import STEP, Step, step_promise
from fedcore_kernels.library.operation import Gradient, Promise, define


def _basis(previous: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run("whitened_basis", (previous,))
    return result


def _basis_promise(previous: Tensor) -> list[Promise]:
    modules, rank, _ = previous.shape
    return [((modules, rank, rank), torch.float64), (previous.shape, torch.float64)]


def _upload(factor: Tensor, basis: Tensor) -> Tensor:
    upload: Tensor = run("whitened_upload", (factor, basis))
    return upload


def _upload_promise(factor: Tensor, basis: Tensor) -> list[Promise]:
    return [(basis.shape, accumulator(factor.dtype))]


def _upload_backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    factor, basis = context.saved_tensors
    client, rows, wide = factor.double(), basis.double(), grad.double()
    through = wide @ client.mT
    to_factor = (client @ rows.mT) @ wide + through.mT @ rows
    return to_factor.to(factor.dtype), (through @ client).to(basis.dtype)


def _sum(stack: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    total: Tensor = run("whitened_sum", (stack, root_shares(weights, stack), basis))
    return total


def _sum_promise(stack: Tensor, weights: Tensor, basis: Tensor) -> list[Promise]:
    return [(basis.shape, accumulator(stack.dtype))]


def _step(total: Tensor, mixing: Tensor, basis: Tensor, eps_rel: float) -> Step:
    step: Step = run("whitened_step", (total, mixing, basis), eps_rel)
    return step


def _step_promise(total: Tensor, mixing: Tensor, basis: Tensor, eps_rel: float) -> list[Promise]:
    modules, rank, width = total.shape
    return step_promise(total.dtype, modules, rank, width)


define("whitened_basis(Tensor previous) -> (Tensor, Tensor)", _basis, _basis_promise)
define(
    "whitened_upload(Tensor factor, Tensor basis) -> Tensor",
    _upload,
    _upload_promise,
    Gradient(("factor", "basis"), _upload_backward),
)
define("whitened_sum(Tensor stack, Tensor weights, Tensor basis) -> Tensor", _sum, _sum_promise)
define(
    f"whitened_step(Tensor total, Tensor mixing, Tensor basis, float eps_rel) -> {STEP}",
    _step,
    _step_promise,
)
