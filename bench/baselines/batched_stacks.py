"""Grams and products of the clients' factors as batched torch: one expression for all modules."""

from __future__ import annotations

import torch
from torch import Tensor


def stacked(stack: Tensor, shares: Tensor) -> Tensor:
    """``F = [sqrt(w_1) A_1; ...]`` of every module, (L, m, k), as a copy."""
    scaled = stack * shares.sqrt().to(stack.dtype)[:, None, None, None]
    return scaled.transpose(0, 1).flatten(1, 2)


def batched_gram(stack: Tensor, shares: Tensor) -> Tensor:
    """``F F^T`` (L, m, m) of stack (N, L, r, k)."""
    rows = stacked(stack, shares)
    return rows @ rows.mT


def batched_cross_gram(stack: Tensor, reference: Tensor) -> Tensor:
    """``reference A_n^T`` (L, q, N, r)."""
    return torch.einsum("lqk,nlrk->lqnr", reference, stack)


def batched_apply_cores(cores: Tensor, stack: Tensor) -> Tensor:
    """``sum_n cores_n A_n`` (L, p, k)."""
    return torch.einsum("lpnr,nlrk->lpk", cores, stack)
