"""``fedcore::product_svd``, ``product_gram`` and ``mean_pair_gram``, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels.checks import accumulator
from fedcore_kernels.client_weights import root_shares
from fedcore_kernels.dispatch import run
from fedcore_kernels.library.operation import Promise, define

_Svd = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _svd(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    rank: int,
    energy: float | None,
    balanced: bool,
    eps_rel: float,
) -> _Svd:
    sides = (left, right, root_shares(weights, left))
    result: _Svd = run("product_svd", sides, rank, energy, balanced, eps_rel)
    return result


def _svd_promise(
    left: Tensor, right: Tensor, weights: Tensor, rank: int, energy: float | None, *_: object
) -> list[Promise]:
    clients, modules, stacked, p = left.shape
    q = right.shape[3]
    dtype = accumulator(torch.promote_types(left.dtype, right.dtype))
    rows = rank if energy is None else None
    return [
        ((modules, rows, p), dtype),
        ((modules, min(clients * stacked, p, q)), torch.float64),
        ((modules, rows, q), dtype),
        ((modules,), torch.int64),
        ((modules,), torch.float64),
        ((modules,), torch.float64),
    ]


def _gram_promise(left: Tensor, *_: object) -> list[Promise]:
    clients, modules = left.shape[:2]
    return [((modules, clients, clients), torch.float64)]


def _gram(left: Tensor, right: Tensor) -> Tensor:
    grams: Tensor = run("product_gram", (left, right))
    return grams


def _pair_gram(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    grams: Tensor = run("mean_pair_gram", (left, right, root_shares(weights, left)))
    return grams


define(
    "product_svd(Tensor left, Tensor right, Tensor weights, int rank, float? energy, "
    "bool balanced, float eps_rel) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _svd,
    _svd_promise,
)
define("product_gram(Tensor left, Tensor right) -> Tensor", _gram, _gram_promise)
define(
    "mean_pair_gram(Tensor left, Tensor right, Tensor weights) -> Tensor",
    _pair_gram,
    _gram_promise,
)
