"""Inner products of clients' updates through their factors, never through the products.

For factors ``left_n`` (r x p, that is ``B_n^T``) and ``right_n`` (r x q, that is ``A_n``) with the
blocks ``S^l_ij = left_i left_j^T`` and ``S^r_ij = right_i right_j^T`` of their Grams

    <left_i^T right_j, left_k^T right_l> = <S^l_ik, S^r_jl>

Robust rules compare updates with it. Comparing factors would not do, since ``(X left_n, X^-T
right_n)`` is the same update. FLoRA-NA fits combinations of the clients' factors with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.dispatch import register
from fedcore_kernels.library.operation import call
from fedcore_kernels.rows import copy_bytes, joint_copies
from fedcore_kernels.stacks import STACK_AXES, check_pair, gram


def _client_blocks(modules: int, clients: int, rank: int, device: torch.device) -> Iterator[slice]:
    """Slices of the clients whose two Grams against all clients fit into a working copy."""
    client_bytes = 2 * 8 * modules * rank * clients * rank
    size = max(1, copy_bytes(device) // client_bytes)
    for first in range(0, clients, size):
        yield slice(first, min(first + size, clients))


def _block(side: Tensor, block: slice, others: slice, rank: int) -> Tensor:
    """``A_i A_j^T`` for clients i in ``block`` and j in ``others`` of ``side`` (l, m, k).

    Returns (l, i, a, j, c).
    """
    rows = side[:, block.start * rank : block.stop * rank]
    columns = side[:, others.start * rank : others.stop * rank]
    return (rows @ columns.mT).unflatten(2, (-1, rank)).unflatten(1, (-1, rank))


def _product_gram_body(left: Tensor, right: Tensor) -> Tensor:
    clients, modules, rank, _ = left.shape
    grams = torch.empty((modules, clients, clients), dtype=torch.float64, device=left.device)
    for part, sides in joint_copies(left, right):
        for block in _client_blocks(part.stop - part.start, clients, rank, left.device):
            # Earlier clients follow by symmetry.
            later = slice(block.start, clients)
            first, second = (_block(side, block, later, rank) for side in sides)
            products = first.mul_(second).sum((2, 4))
            grams[part, later, block] = products.mT
            grams[part, block, later] = products
    return grams


def _mean_pair_gram_body(left: Tensor, right: Tensor, root: Tensor) -> Tensor:
    clients, modules, rank, _ = left.shape
    grams = torch.zeros((modules, clients, clients), dtype=torch.float64, device=left.device)
    everyone = slice(0, clients)
    for part, sides in joint_copies(left, right):
        for block in _client_blocks(part.stop - part.start, clients, rank, left.device):
            shares = root[block].square()[:, None, None]
            # (l, n, a, j, c) as (l, j, (n, a, c)): H sums over everything but i and j.
            first, second = (
                _block(side, block, everyone, rank).permute(0, 3, 1, 2, 4) for side in sides
            )
            grams[part] += (first * shares).flatten(2) @ second.flatten(2).mT
    return grams


register("product_gram", "torch", _product_gram_body)
register("mean_pair_gram", "torch", _mean_pair_gram_body)


def block_grams(stack: checks.ArrayLike) -> Tensor:
    """The blocks ``S_ij = A_i A_j^T`` of every module's dual Gram, unweighted.

    Args:
        stack: (N, L, r, k) floating point, any strides.

    Returns:
        (L, N, N, r, r) fp64, a view of :func:`gram`; ``S_ij = S_ji^T``.

    Raises:
        KernelInputError: a wrong shape or dtype.

    Cost: reads N L r k numbers; 2 L m^2 k flops and 8 L m^2 bytes with m = N r. Pass some modules
    at a time where the latter is too much.

    Example:
        >>> block_grams([[[[1.0, 2.0]]], [[[3.0, 0.0]]]])[0, 0, 1]
        tensor([[3.]], dtype=torch.float64)
    """
    uploads = checks.tensor("stack", stack, STACK_AXES)
    clients, rank = uploads.shape[0], uploads.shape[2]
    blocks = gram(uploads).unflatten(2, (clients, rank)).unflatten(1, (clients, rank))
    return blocks.transpose(2, 3)


def product_gram(left: checks.ArrayLike, right: checks.ArrayLike) -> Tensor:
    """``K_ij = <left_i^T right_i, left_j^T right_j>`` for every module.

    ``K_nn`` is the squared norm of an update and ``K_ii + K_jj - 2 K_ij`` a squared distance; the
    difference cancels, so that relative distances below 1e-8 are noise of either sign.

    Args:
        left: (N, L, r, p) floating point, any strides: the clients' ``B^T``, scales absorbed.
            Clients of lower rank have zero rows.
        right: (N, L, r, q) the clients' ``A``.

    Returns:
        (L, N, N) fp64, symmetric. Its sum over modules compares whole adapters.

    Raises:
        KernelInputError: a wrong shape, dtype or device.

    Cost: reads N L r (p + q) numbers; L m^2 (p + q) flops with m = N r. The block Grams of a few
    clients and modules exist at a time.

    Example:
        >>> product_gram([[[[1.0, 0.0]]], [[[1.0, 2.0]]]], [[[[3.0]]], [[[4.0]]]])
        tensor([[[ 9., 12.],
                 [12., 80.]]], dtype=torch.float64)
    """
    first, second = check_pair(left, right)
    grams: Tensor = call("product_gram", first, second)
    return grams


def mean_pair_gram(
    left: checks.ArrayLike, right: checks.ArrayLike, weights: checks.ArrayLike
) -> Tensor:
    """``H_ij = <M, left_i^T right_j>`` with ``M = sum_n w_n left_n^T right_n`` for every module.

    The inner products of the mean update with every pair of one client's left and another's right
    factor: ``H_ij = sum_n w_n <S^l_ni, S^r_nj>``. With it ``<M, (sum_i p_i left_i)^T
    (sum_j q_j right_j)> = p^T H q``.

    Args:
        left: (N, L, r, p) floating point, any strides: the clients' ``B^T``, scales absorbed.
        right: (N, L, r, q) the clients' ``A``.
        weights: (N,) real numbers, normalised in fp64.

    Returns:
        (L, N, N) fp64, first index left, second index right; not symmetric.

    Raises:
        KernelInputError: a wrong shape, dtype or device, or unusable weights.

    Cost: reads N L r (p + q) numbers; 2 L m^2 (p + q + N) flops with m = N r. The block Grams of a
    few clients and modules exist at a time.

    Example:
        >>> mean_pair_gram([[[[1.0, 0.0]]], [[[1.0, 2.0]]]], [[[[3.0]]], [[[4.0]]]], [1, 1])
        tensor([[[10.5000, 14.0000],
                 [34.5000, 46.0000]]], dtype=torch.float64)
    """
    first, second = check_pair(left, right)
    counts = client_weights(weights, first.shape[0])
    grams: Tensor = call("mean_pair_gram", first, second, counts)
    return grams
