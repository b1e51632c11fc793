"""What an aggregation lost and how far it moved the factors, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.methods.base import FACTORS, Aggregate, Broadcast, Family
from fedcore_kernels import product_norm
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class ModuleDiagnosis:
    """One module of one round.

    Attributes:
        aggregation_error: ``||M - result||_F / ||M||_F``, the broadcast product against the
            weighted mean of the clients' products, both as updates of the base model; ``nan``
            if M is zero.
        factor_drift: how far the factors moved, ``||new - old||_F / ||old||_F``; ``nan`` from zero.
        kept_rank, condition: as the server step reported them; ``None`` for plain means.
        error_floor, error_ceiling: between what the server step says that the error must lie;
            ``nan`` where it says nothing.
    """

    module: str
    aggregation_error: float
    factor_drift: float
    kept_rank: int | None
    condition: float | None
    error_floor: float = nan
    error_ceiling: float = nan


def diagnose(
    cohort: Cohort,
    aggregate: Aggregate,
    previous: Broadcast,
    family: Family,
    offset: Mapping[str, Tensor] | None = None,
) -> list[ModuleDiagnosis]:
    """Compare a round's result with the exact weighted mean of the uploaded products.

    The result is the broadcast product and the residual together.

    Everything is done on stacked factors through their QR cores, in fp64; no matrix of the size of
    a weight is formed and nothing cancels.

    Args:
        offset: module to the initial Gram factor that the model subtracts, so that errors are
            relative to the update and not to the starting Gram.
    """
    if family == "none" or not len(cohort):
        return []
    layout = previous.layout
    diagnoses = []
    shares = cohort.shares.tolist()
    for module in layout.modules:
        left, right = [], []
        for n, share in enumerate(shares):
            b, a = _product(cohort, n, previous, module, family)
            left.append(b * share)
            right.append(a)
        b, a = _factors(aggregate.row, layout, module, family)
        # The result carries the same offset as the mean, so the difference is free of it.
        off_left, off_right = [*left, -b], [*right, a]
        if module in aggregate.residual:
            beside = aggregate.residual[module]
            off_left.append(-beside.outer.to(torch.float64))
            off_right.append(beside.inner.to(torch.float64))
        gap = float(product_norm(torch.cat(off_left), torch.cat(off_right)))
        if offset is not None and module in offset:
            start = offset[module].to(torch.float64)
            left.append(-start)
            right.append(start)
        target = float(product_norm(torch.cat(left), torch.cat(right)))
        step = aggregate.steps.get(module)
        floor, ceiling = step.error_bounds if step else (nan, nan)
        diagnoses.append(
            ModuleDiagnosis(
                module=module,
                aggregation_error=gap / target if target > 0 else nan,
                factor_drift=_drift(aggregate.row, previous, module),
                kept_rank=step.rank if step else None,
                condition=step.condition if step else None,
                error_floor=floor,
                error_ceiling=ceiling,
            )
        )
    return diagnoses


def _factors(
    row: Tensor, layout: FactorLayout, module: str, family: Family
) -> tuple[Tensor, Tensor]:
    """Left and right factor ``(r, width)``; ``left^T right`` is the module's update."""
    slots = {factor: layout.by_name[f"{module}.{factor}"] for factor in FACTORS[family]}
    factors = {factor: layout.view(row, slot) for factor, slot in slots.items()}
    return _multiplied({f: view.to(torch.float64) for f, view in factors.items()}, family)


def _multiplied(factors: Mapping[str, Tensor], family: Family) -> tuple[Tensor, Tensor]:
    """``A^T A``, ``B A`` or ``B (R A)`` by its two factors of ``r`` rows."""
    if family == "gram":
        return factors["A"], factors["A"]
    right = factors["R"] @ factors["A"] if family == "tri" else factors["A"]
    return factors["B"], right


def _product(
    cohort: Cohort, n: int, previous: Broadcast, module: str, family: Family
) -> tuple[Tensor, Tensor]:
    """One client's factors; one that it did not send is the broadcast's."""
    sent, row = cohort.layout, cohort.updates[n]
    factors = {}
    for factor in FACTORS[family]:
        name = f"{module}.{factor}"
        if name in sent.by_name:
            factors[factor] = sent.view(row, sent.by_name[name]).to(torch.float64)
        else:
            slot = previous.layout.by_name[name]
            factors[factor] = previous.layout.view(previous.row, slot).to(torch.float64)
    return _multiplied(factors, family)


def _drift(row: Tensor, previous: Broadcast, module: str) -> float:
    old_norm = moved = 0.0
    for slot in previous.layout.factor_slots:
        if slot.module == module:
            new = previous.layout.view(row, slot).to(torch.float64)
            old = previous.layout.view(previous.row, slot).to(torch.float64)
            old_norm += float(old.square().sum())
            moved += float((new - old).square().sum())
    return (moved / old_norm) ** 0.5 if old_norm > 0 else nan
