"""Triton bodies of the operations on a stack (N, L, r, k)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda.grouped import apply_rows, cross_gram_rows, gram_rows
from fedcore_kernels.cuda.tasks import Segments, of_stack


def segments_of(stack: Tensor, rows: int) -> Segments:
    """The factors of ``stack``, with counterparts of ``rows`` rows."""
    clients, modules, rank, width = stack.shape
    client, module, row, column = stack.stride()
    return of_stack((clients, modules, rank, width), (client, module, row, column), rows)


def gram(stack: Tensor, root: Tensor) -> Tensor:
    """``F F^T`` (L, m, m) fp64."""
    return gram_rows(stack, stack.shape[0], segments_of(stack, 1), root)


def cross_gram(stack: Tensor, reference: Tensor) -> Tensor:
    """``reference A_n^T`` (L, q, N, r) fp64."""
    clients, modules, rank, _ = stack.shape
    rows = reference.shape[1]
    products = cross_gram_rows(
        stack, clients, segments_of(stack, rows), reference.contiguous(), rows
    )
    return products.mT.reshape(modules, rows, clients, rank)


def apply_cores(stack: Tensor, cores: Tensor) -> Tensor:
    """``sum_n cores_n A_n`` (L, p, k)."""
    modules, rows = cores.shape[:2]
    out = torch.empty(
        (modules, rows, stack.shape[3]),
        dtype=checks.accumulator(stack.dtype),
        device=stack.device,
    )
    apply_rows(stack, stack.shape[0], segments_of(stack, rows), cores.flatten(2).mT, out)
    return out
