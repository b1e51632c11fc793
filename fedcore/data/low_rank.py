"""Low-rank updates of base weights, which some methods send beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import product_svd


class LowRank(NamedTuple):
    """A matrix ``outer^T inner (d_out, d_in)`` by its factors: ``(p, d_out)`` and ``(p, d_in)``."""

    outer: Tensor
    inner: Tensor

    @property
    def rank(self) -> int:
        """Number of rows ``p``, an upper bound of the rank of the product."""
        return self.outer.shape[0]

    @property
    def numel(self) -> int:
        """Numbers in both factors."""
        return self.outer.numel() + self.inner.numel()


def total(parts: Sequence[LowRank]) -> LowRank:
    """The sum of products of one shape, of rank ``min(sum of ranks, d_out, d_in)`` at most.

    Stacked while that is no larger than the smaller side; beyond, one decomposition of the product
    in factored form brings the rank down to that side without loss but rounding.
    """
    stacked = LowRank(
        torch.cat([part.outer for part in parts]), torch.cat([part.inner for part in parts])
    )
    limit = min(stacked.outer.shape[1], stacked.inner.shape[1])
    if stacked.rank <= limit:
        return stacked
    one = torch.ones(1, dtype=torch.float64)
    best = product_svd(stacked.outer[None, None], stacked.inner[None, None], one, limit)
    return LowRank(
        best.left[0].to(stacked.outer.dtype).contiguous(),
        best.right[0].to(stacked.inner.dtype).contiguous(),
    )


def accumulated(
    held: Mapping[str, LowRank], increment: Mapping[str, LowRank]
) -> dict[str, LowRank]:
    """Module to the sum of both; modules of rank 0 are left out."""
    sums = dict(held)
    for module, part in increment.items():
        if part.rank:
            sums[module] = total([held[module], part] if module in held else [part])
    return sums


def packed(parts: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The factors by ``module/outer`` and ``module/inner``, as files hold them."""
    return {
        f"{module}/{side}": tensor
        for module, part in sorted(parts.items())
        for side, tensor in part._asdict().items()
    }


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """What :func:`packed` packed.

    Raises:
        KeyError: a factor without its partner.
    """
    modules = sorted({name.rpartition("/")[0] for name in tensors})
    return {m: LowRank(tensors[f"{m}/outer"], tensors[f"{m}/inner"]) for m in modules}
