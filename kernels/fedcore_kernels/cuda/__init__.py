"""The Triton bodies of the operations: launchers that know pointers, strides and grids.

Nothing here is imported before an operation runs on a CUDA device, and nothing needs triton before
that. :func:`register_bodies` registers every body with what it cannot take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.dispatch import Obstacle, needs_cuda, register

RANK_LIMIT = 128
"""Rows of one factor that the grouped kernels take."""

JACOBI_LIMIT = 64
"""Order of the matrices that the Jacobi kernels take."""


@cache
def _triton_is_missing() -> bool:
    return find_spec("triton") is None


def _on_card(first: Tensor, *others: Tensor) -> str | None:
    # Operations check that their tensors share a device; only weights may be elsewhere.
    why = needs_cuda(first)
    if why is None and _triton_is_missing():
        return "triton is not installed"
    return why


def _contiguous_rows(first: Tensor, *others: Tensor) -> str | None:
    if first.stride(-1) != 1:
        return "the last axis of its first argument is not contiguous"
    return None


def _factor_rank(stack: Tensor, *others: Tensor) -> str | None:
    rows = max([stack.shape[2], *(t.shape[1] for t in others if t.dim() > 2)])
    if rows > RANK_LIMIT:
        return f"a factor has {rows} rows, more than {RANK_LIMIT}"
    return None


def _contiguous_pair(left: Tensor, right: Tensor, *others: Tensor) -> str | None:
    return _contiguous_rows(left) or _contiguous_rows(right)


def _not_fp64(*factors: Tensor) -> str | None:
    if torch.float64 in {factor.dtype for factor in factors[:2]}:
        return "a Gram of fp64 factors has fewer digits than they have"
    return None


def _jacobi_order(matrix: Tensor) -> str | None:
    if matrix.shape[-1] > JACOBI_LIMIT:
        return f"matrices are of order {matrix.shape[-1]}, more than {JACOBI_LIMIT}"
    return None


def _few_rows(*factors: Tensor) -> str | None:
    rows = max(factor.shape[1] for factor in factors)
    if rows > RANK_LIMIT:
        return f"a factor has {rows} rows, more than {RANK_LIMIT}"
    return None


def _small_sides(*matrices: Tensor) -> str | None:
    side = max(size for matrix in matrices for size in matrix.shape[-2:])
    if side > JACOBI_LIMIT:
        return f"a side of the matrix is {side}, more than {JACOBI_LIMIT}"
    return None


def _small_rows(source: Tensor, target: Tensor) -> str | None:
    rows = max(source.shape[-2], target.shape[-2])
    if rows > JACOBI_LIMIT:
        return f"a factor has {rows} rows, more than {JACOBI_LIMIT}"
    return None


def _later(path: str) -> Callable[..., Any]:
    module, name = path.split(":")

    def body(*arguments: Any) -> Any:
        function = getattr(import_module(f"fedcore_kernels.cuda.{module}"), name)
        return function(*arguments)

    return body


def _first_of(*obstacles: Obstacle) -> Obstacle:
    def obstacle(*tensors: Tensor) -> str | None:
        return next((why for o in obstacles if (why := o(*tensors)) is not None), None)

    return obstacle


LIMITS: dict[str, tuple[str, tuple[Obstacle, ...]]] = {
    "weighted_mean": ("weighted_mean:weighted_mean", (_contiguous_rows,)),
    "gram": ("stacks:gram", (_contiguous_rows, _factor_rank)),
    "cross_gram": ("stacks:cross_gram", (_contiguous_rows, _factor_rank)),
    "apply_cores": ("stacks:apply_cores", (_contiguous_rows, _factor_rank)),
    "eigh_small": ("spectra:eigh_small", (_small_sides,)),
    "svd_small": ("spectra:svd_small", (_small_sides,)),
    "polar": ("polar:polar", (_small_sides,)),
    "procrustes": ("polar:procrustes", (_small_rows,)),
    "nystrom_step": ("florg:nystrom_step", (_contiguous_rows, _factor_rank)),
    "truncated_step": ("florg:truncated_step", (_contiguous_rows, _factor_rank)),
    "product_svd": ("products:product_svd", (_contiguous_pair, _factor_rank, _not_fp64)),
    "product_gram": ("products:product_gram", (_contiguous_pair, _factor_rank)),
    "mean_pair_gram": ("products:mean_pair_gram", (_contiguous_pair, _factor_rank)),
    "soft_rotation": ("rotations:soft_rotation", (_jacobi_order,)),
    "whitened_basis": ("whitened:whitened_basis", (_contiguous_rows, _few_rows)),
    "whitened_upload": ("whitened:whitened_upload", (_contiguous_rows, _few_rows)),
    "whitened_sum": ("whitened:whitened_sum", (_contiguous_rows, _factor_rank)),
    "whitened_step": ("whitened:whitened_step", (_contiguous_rows, _few_rows)),
    "florg_round": ("florg_round:florg_round", (_contiguous_rows,)),
}
"""Where each body is, and what it cannot take besides tensors that are not on a card."""


def register_bodies(on_card: Obstacle = _on_card) -> None:
    """Register every Triton body; ``on_card`` says why tensors are not where kernels run."""
    for op, (path, obstacles) in LIMITS.items():
        register(op, "triton", _later(path), _first_of(on_card, *obstacles))
