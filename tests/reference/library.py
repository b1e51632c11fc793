"""Arguments for ``torch.ops.fedcore.*`` and calls of the public functions, from one round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fedcore_kernels as kernels
from tests.property.stacks import Round

GRADIENTS: dict[str, tuple[int, ...]] = {
    "apply_cores": (0, 1),
    "cross_gram": (0, 1),
    "gram": (0,),
    "polar": (0,),
    "procrustes": (0, 1),
    "product_norm": (0, 1),
    "weighted_mean": (0,),
    "whitened_upload": (0, 1),
}
"""Operations that have a gradient, and the positions of the arguments they have it for."""

REPORT_NAN = ("nystrom_step", "whitened_step")
"""Operations that report a gap and a tail which they do not know."""

OPTIONS_BY_NAME = (
    "client_shares",
    "nystrom_step",
    "product_svd",
    "soft_rotation",
    "truncated_step",
)
"""Operations that take what their public functions only take by name, or that have none."""


def _cores(case: Round) -> Tensor:
    clients, modules, rank, _ = case.stack.shape
    random = torch.Generator().manual_seed(7)
    return torch.randn(modules, 3, clients, rank, generator=random).to(case.stack.dtype)


def _rows(case: Round) -> Tensor:
    """Every second column of a wider matrix."""
    return case.stack.flatten(1).repeat_interleave(2, 1)[:, ::2]


def _before(case: Round) -> Tensor:
    """Factors of the server (L, q, k) with one row more than those of the clients."""
    return torch.cat([case.previous, case.previous[:, :1].roll(1, -1)], 1)


def op_arguments(case: Round) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation in the order of its schema."""
    stack, weights, previous, before = case.stack, case.weights, case.previous, _before(case)
    one, rank, pair = stack[0], stack.shape[2], stack[..., :-1].flip(0)
    mixing, basis = kernels.whitened_basis(before)
    return {
        "apply_cores": (_cores(case), stack),
        "client_shares": (stack, weights),
        "cross_gram": (stack, before),
        "eigh_small": (one @ one.mT,),
        "gram": (stack, weights),
        "mean_pair_gram": (stack, pair, weights),
        "nystrom_step": (stack, weights, before, 1e-12, True, "zero"),
        "polar": (one, 1e-6, 0.0),
        "procrustes": (one, previous, True),
        "product_gram": (stack, pair),
        "product_norm": (one, previous[..., :5]),
        "product_svd": (stack, pair, weights, rank, None, True, 1e-12),
        "soft_rotation": (one @ previous.mT, 0.7, 1e-12),
        "svd_small": (one,),
        "truncated_step": (stack, weights, before, rank, 1e-12, True),
        "weighted_mean": (_rows(case), weights),
        "whitened_basis": (before,),
        "whitened_step": (before, mixing, basis, 1e-12),
        "whitened_sum": (stack, weights, basis),
        "whitened_upload": (one, basis),
    }


def public_calls(case: Round) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """A public function and its arguments for every operation, some options included."""
    stack, weights, previous, before = case.stack, case.weights, case.previous, _before(case)
    rank, pair = stack.shape[2], stack[..., :-1].flip(0)
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        name: (getattr(kernels, name), arguments)
        for name, arguments in op_arguments(case).items()
        if name not in OPTIONS_BY_NAME
    }
    return found | {
        "align_and_average": (
            lambda a, b, r, w: kernels.align_and_average([a, b], [r, None], w, 0.7),
            (stack, pair, previous, weights),
        ),
        "block_grams": (kernels.block_grams, (stack,)),
        "gram without weights": (kernels.gram, (stack,)),
        "weights in a list": (kernels.weighted_mean, (_rows(case), weights.tolist())),
        "polar, regularised": (
            lambda matrix: kernels.polar(matrix, None, 0.1),
            (previous @ previous.mT,),
        ),
        "nystrom_step": (kernels.nystrom_step, (stack, weights, before)),
        "nystrom_step, keep_prev": (
            lambda *a: kernels.nystrom_step(*a, align=False, on_rank_loss="keep_prev"),
            (stack, weights, before, 1e-9),
        ),
        "product_svd": (
            lambda *a: kernels.product_svd(*a, split="balanced"),
            (stack, pair, weights, rank),
        ),
        "product_svd, by energy": (
            lambda *a: kernels.product_svd(*a, energy=0.6),
            (stack, pair, weights),
        ),
        "rotate": (
            lambda a, r: kernels.rotate(a, kernels.rotations([a], [r]).rotation),
            (stack, previous),
        ),
        "soft_rotation": (
            lambda x: kernels.soft_rotation(x, 0.7),
            (stack[0] @ previous.mT,),
        ),
        "truncated_step": (kernels.truncated_step, (stack, weights, before, rank)),
        "truncated_step, no previous": (
            lambda *a: kernels.truncated_step(*a, align=False),
            (stack, weights, None, rank + 1),
        ),
    }
