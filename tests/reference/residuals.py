"""What clients hold after a round whose method sends a residual, as dense matrices in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.methods.base import Aggregate
from fedcore_kernels.layout import FactorLayout
from tests.reference.updates import factors, update


def residual(layout: FactorLayout, result: Aggregate, module: str) -> Tensor:
    """``outer^T inner (d_out, d_in)``, zero for a module without one."""
    if module not in result.residual:
        return torch.zeros_like(update(layout, result.row, module))
    outer, inner = result.residual[module]
    return outer.double().T @ inner.double()


def received(layout: FactorLayout, result: Aggregate, module: str) -> Tensor:
    """``B A`` of the next adapter and the residual: the new model minus the old base weight."""
    return update(layout, result.row, module) + residual(layout, result, module)


def covariance(cohort: Cohort, module: str) -> Tensor:
    """``sum_n w_n (B_n - Bbar)(A_n - Abar)``."""
    pairs = [factors(cohort.layout, row, module) for row in cohort.updates]
    b, a = (torch.stack(side) for side in zip(*pairs, strict=True))
    shares = cohort.shares[:, None, None]
    return (shares * (b - (shares * b).sum(0)) @ (a - (shares * a).sum(0))).sum(0)
