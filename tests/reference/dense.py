"""What each operation of ``fedcore_kernels`` means, as plain dense algebra in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(updates: Tensor, shares: Tensor) -> Tensor:
    """``sum_n w_n x_n``."""
    return sum((w * x for w, x in zip(shares, updates.double(), strict=True)), torch.zeros(()))


def stacked(stack: Tensor, root: Tensor) -> Tensor:
    """``F = [sqrt(w_1) A_1; ...]`` of every module, (L, m, k)."""
    clients = [s * a for s, a in zip(root, stack.double(), strict=True)]
    return torch.cat(clients, dim=-2)


def mean_gram(stack: Tensor, shares: Tensor) -> Tensor:
    """``Q = sum_n w_n A_n^T A_n`` of every module, (L, k, k)."""
    wide = stack.double()
    return sum((w * a.mT @ a for w, a in zip(shares, wide, strict=True)), torch.zeros(()))


def gram(stack: Tensor, root: Tensor) -> Tensor:
    """``F F^T``."""
    rows = stacked(stack, root)
    return rows @ rows.mT


def cross_gram(stack: Tensor, reference: Tensor) -> Tensor:
    """``reference A_n^T``."""
    return torch.stack([reference.double() @ a.mT for a in stack.double()], dim=2)


def apply_cores(stack: Tensor, cores: Tensor) -> Tensor:
    """``sum_n cores_n A_n``."""
    wide = cores.double()
    terms = (wide[:, :, n] @ a for n, a in enumerate(stack.double()))
    return sum(terms, torch.zeros(()))


def symmetric_root(matrix: Tensor, power: float, eps_rel: float = 0.0) -> Tensor:
    """``matrix^power`` on the eigenspaces above ``eps_rel`` times the largest eigenvalue."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    kept = (values > eps_rel * values[..., -1:]) & (values > 0)
    powers = torch.where(kept, values.abs().clamp(min=1e-300) ** power, 0.0)
    return (vectors * powers[..., None, :]) @ vectors.mT


def polar(matrix: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """``sum_i u_i v_i^T`` over singular values above the cut-off, and their number."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = (values > cutoff * values[..., :1]) & (values > 0)
    return left @ (kept[..., :, None] * right), kept.sum(-1)


def procrustes(source: Tensor, target: Tensor, rotation_only: bool) -> Tensor:
    """``U D V^T`` of ``target source^T``, with ``D = diag(1, .., det)`` for a rotation."""
    left, values, right = torch.linalg.svd(
        target.double() @ source.double().mT, full_matrices=False
    )
    middle = torch.ones_like(values)
    if rotation_only:
        middle[..., -1] = torch.linalg.det(left) * torch.linalg.det(right)
    return left @ torch.diag_embed(middle) @ right


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """``||left^T right||_F``."""
    return torch.linalg.matrix_norm(left.double().mT @ right.double())


def whitened_upload(factor: Tensor, basis: Tensor) -> Tensor:
    """``V Q_n`` with the client's Gram ``Q_n = A_n^T A_n``."""
    wide = factor.double()
    return basis.double() @ (wide.mT @ wide)


def whitened_sum(stack: Tensor, root: Tensor, basis: Tensor) -> Tensor:
    """``V Q`` with ``Q = sum_n w_n A_n^T A_n``."""
    return basis.double() @ mean_gram(stack, root.square())


def positive_sign(vectors: Tensor) -> Tensor:
    """Sign of the entry of largest modulus of each column."""
    out = torch.ones(*vectors.shape[:-2], vectors.shape[-1], dtype=vectors.dtype)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).reshape(-1, out.dim()):
        *batch, column = index.tolist()
        vector = vectors[(*batch, slice(None), column)]
        if vector[vector.abs().argmax()] < 0:
            out[tuple(index.tolist())] = -1.0
    return out
