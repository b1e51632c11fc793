"""The fp64 definitions as bodies of the operations, for ``backend("reference")``."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import Eigh, FactorStep, Polar, Svd
from fedcore_kernels.dispatch import register
from fedcore_kernels.florg_round import by_group
from tests.reference import dense, florg, products, rotations


def _eigh(matrix: Tensor) -> Eigh:
    wide = matrix.double()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    vectors = vectors.flip(-1)
    return Eigh(values.flip(-1), vectors * dense.positive_sign(vectors)[..., None, :])


def _svd(matrix: Tensor) -> Svd:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = dense.positive_sign(left)
    return Svd(left * signs[..., None, :], values, right * signs[..., :, None])


def _polar(matrix: Tensor, cutoff: float, regularisation: float) -> Polar:
    wide = matrix.double()
    if regularisation:
        size = torch.linalg.matrix_norm(wide)[..., None, None]
        wide = wide + regularisation * size * torch.eye(wide.shape[-1], dtype=wide.dtype)
    return Polar(*dense.polar(wide, cutoff))


def _truncated(
    stack: Tensor, root: Tensor, previous: Tensor, rank: int, eps_rel: float, align: bool
) -> FactorStep:
    shares = root.square()
    rows, values = florg.leading(stack, shares, rank, eps_rel)
    if align:
        factor = florg.truncated(stack, shares, previous, rank, eps_rel)
    else:
        shape = (len(rows), rank, stack.shape[-1])
        factor = torch.zeros(shape, dtype=torch.float64)
        for row, til in zip(factor, rows, strict=True):
            row[: len(til)] = florg.principal(til)
    count = torch.tensor([len(til) for til in rows])
    tail = values[:, rank:].clamp(min=0).square().sum(-1).sqrt()
    padded = torch.nn.functional.pad(values, (0, 1))
    last = padded[:, rank - 1] if rank <= values.shape[1] else torch.zeros_like(tail)
    after = padded[:, min(rank, values.shape[1])]
    gap = torch.where(count == rank, 1 - after / last, 1.0)
    least = values[torch.arange(len(rows)), (count - 1).clamp(min=0)]
    condition = torch.where(count > 0, (values[:, 0] / least).abs().sqrt(), float("inf"))
    return FactorStep(factor, count, condition, gap, tail, count)


def _nystrom(
    stack: Tensor, root: Tensor, previous: Tensor, eps_rel: float, align: bool, on_rank_loss: str
) -> FactorStep:
    before = previous.double()
    factor = florg.inverse_root_form(stack, root.square(), before, eps_rel)
    left, values, _ = torch.linalg.svd(before @ dense.stacked(stack, root).mT)
    kept = (values > eps_rel * values[:, :1]) & (values > 0)
    rank = kept.sum(-1)
    if on_rank_loss == "keep_prev":
        for row, basis, count, old in zip(factor, left, rank.tolist(), before, strict=True):
            row += old - basis[:, :count] @ (basis[:, :count].mT @ old)
    if not align:
        factor = florg.principal(factor)
    least = values[torch.arange(len(values)), (rank - 1).clamp(min=0)]
    condition = torch.where(rank > 0, values[:, 0] / least, float("inf"))
    unknown = torch.full_like(condition, float("nan"))
    return FactorStep(factor, rank, condition, unknown, unknown, rank)


def _whitened_basis(previous: Tensor) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(previous.double(), full_matrices=False)
    return left @ torch.diag_embed(values), right


def _whitened_step(total: Tensor, mixing: Tensor, basis: Tensor, eps_rel: float) -> FactorStep:
    outer, wide = mixing.double(), total.double()
    lower = (wide @ basis.double().mT).tril()
    energies = lower + lower.mT - torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1))
    core = outer @ energies @ outer.mT
    factor = dense.symmetric_root(core, -0.5, eps_rel**2) @ outer @ wide
    values = torch.linalg.eigvalsh(core).flip(-1).clamp(min=0).sqrt()
    rank = ((values > eps_rel * values[:, :1]) & (values > 0)).sum(-1)
    least = values[torch.arange(len(values)), (rank - 1).clamp(min=0)]
    condition = torch.where(rank > 0, values[:, 0] / least, float("inf"))
    unknown = torch.full_like(condition, float("nan"))
    return FactorStep(factor, rank, condition, unknown, unknown, rank)


def register_reference() -> None:
    """Register every definition as the body ``reference`` of its operation."""
    for op, body in {
        "weighted_mean": dense.weighted_mean,
        "gram": dense.gram,
        "cross_gram": dense.cross_gram,
        "apply_cores": dense.apply_cores,
        "eigh_small": _eigh,
        "svd_small": _svd,
        "polar": _polar,
        "procrustes": dense.procrustes,
        "product_norm": dense.product_norm,
        "product_svd": products.product_svd,
        "product_gram": products.product_gram,
        "mean_pair_gram": products.mean_pair_gram,
        "soft_rotation": rotations.soft_rotation,
        "nystrom_step": _nystrom,
        "truncated_step": _truncated,
        "whitened_basis": _whitened_basis,
        "whitened_upload": dense.whitened_upload,
        "whitened_step": _whitened_step,
        "whitened_sum": dense.whitened_sum,
        "florg_round": by_group,
    }.items():
        register(op, "reference", body)
