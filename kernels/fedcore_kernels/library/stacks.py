"""``fedcore::gram``, ``cross_gram`` and ``apply_cores``, the latter two adjoint to each other.

With the gradient H of the result, per module:

    gram        dA_n = sqrt(w_n) sum_j sqrt(w_j) (H + H^T)_nj A_j
    cross_gram  dA_n = H_n^T reference,      d reference = sum_n H_n A_n
    apply_cores dA_n = cores_n^T H,          d cores_n = H A_n^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.checks import accumulator
from fedcore_kernels.client_weights import normalised, root_shares
from fedcore_kernels.dispatch import run
from fedcore_kernels.library.operation import Gradient, Promise, define


def _gram(stack: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        root = torch.ones(stack.shape[0], dtype=torch.float64, device=stack.device)
    else:
        root = root_shares(weights, stack)
    grams: Tensor = run("gram", (stack, root))
    return grams


def _gram_promise(stack: Tensor, weights: Tensor | None) -> list[Promise]:
    clients, modules, rank, _ = stack.shape
    return [((modules, clients * rank, clients * rank), torch.float64)]


def _gram_backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
    stack, weights = context.saved_tensors
    clients, _, rank, _ = stack.shape
    cores = grad + grad.mT
    if weights is not None:
        scale = normalised(weights).sqrt().to(grad.device).repeat_interleave(rank)
        cores = cores * (scale[:, None] * scale)
    rows = torch.ops.fedcore.apply_cores(cores.unflatten(-1, (clients, rank)), stack)
    return rows.unflatten(1, (clients, rank)).transpose(0, 1).to(stack.dtype), None


def _cross_gram(stack: Tensor, reference: Tensor) -> Tensor:
    products: Tensor = run("cross_gram", (stack, reference))
    return products


def _cross_gram_promise(stack: Tensor, reference: Tensor) -> list[Promise]:
    clients, modules, rank, _ = stack.shape
    return [((modules, reference.shape[1], clients, rank), torch.float64)]


def _through_clients(cores: Tensor, rows: Tensor) -> Tensor:
    """``cores_n^T rows`` (N, L, r, k) of cores (L, q, N, r) and rows (L, q, k), in fp64."""
    return torch.einsum("lqnr,lqk->nlrk", cores.double(), rows.double())


def _cross_gram_backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    stack, reference = context.saved_tensors
    to_stack, to_reference = context.needs_input_grad
    return (
        _through_clients(grad, reference).to(stack.dtype) if to_stack else None,
        torch.ops.fedcore.apply_cores(grad, stack).to(reference.dtype) if to_reference else None,
    )


def _apply_cores(cores: Tensor, stack: Tensor) -> Tensor:
    factors: Tensor = run("apply_cores", (stack, cores))
    return factors


def _apply_cores_promise(cores: Tensor, stack: Tensor) -> list[Promise]:
    return [((*cores.shape[:2], stack.shape[3]), accumulator(stack.dtype))]


def _apply_cores_backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cores, stack = context.saved_tensors
    to_cores, to_stack = context.needs_input_grad
    return (
        torch.ops.fedcore.cross_gram(stack, grad).to(cores.dtype) if to_cores else None,
        _through_clients(cores, grad).to(stack.dtype) if to_stack else None,
    )


define(
    "gram(Tensor stack, Tensor? weights) -> Tensor",
    _gram,
    _gram_promise,
    Gradient(("stack",), _gram_backward),
)
define(
    "cross_gram(Tensor stack, Tensor reference) -> Tensor",
    _cross_gram,
    _cross_gram_promise,
    Gradient(("stack", "reference"), _cross_gram_backward),
)
define(
    "apply_cores(Tensor cores, Tensor stack) -> Tensor",
    _apply_cores,
    _apply_cores_promise,
    Gradient(("cores", "stack"), _apply_cores_backward),
)
