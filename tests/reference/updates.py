"""The updates that LoRA rows stand for, as dense matrices in fp64."""

from __future__ import annotations

from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore_kernels.layout import FactorLayout


def factors(layout: FactorLayout, row: Tensor, module: str) -> tuple[Tensor, Tensor]:
    """``B (d_out, r)`` and ``A (r, d_in)``."""
    outer, inner = (layout.view(row, layout.by_name[f"{module}.{name}"]) for name in "BA")
    return outer.double().T, inner.double()


def update(layout: FactorLayout, row: Tensor, module: str) -> Tensor:
    """``B A (d_out, d_in)``."""
    outer, inner = factors(layout, row, module)
    return outer @ inner


def mean_update(cohort: Cohort, module: str) -> Tensor:
    """``M = sum_n w_n B_n A_n``."""
    zero = update(cohort.layout, cohort.updates[0], module) * 0
    pairs = zip(cohort.shares, cohort.updates, strict=True)
    return sum((w * update(cohort.layout, row, module) for w, row in pairs), zero)
