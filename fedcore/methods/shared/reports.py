"""What the step of a server found out, module by module, and what of it is worth a flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan

from torch import Tensor

from fedcore.methods.base import StepReport
from fedcore_kernels import FactorLayout


def steps_of(
    modules: Sequence[str], rank: Tensor, condition: Tensor, gap: Tensor | None = None
) -> dict[str, StepReport]:
    """Module to its report, from one number per module.

    Args:
        modules: L names, of a group of modules that were computed at once.
        rank, condition, gap: ``(L,)``, as :class:`~fedcore.methods.base.StepReport` has them; a gap
            that is None is not known.
    """
    gaps = [nan] * len(modules) if gap is None else gap.tolist()
    columns = zip(rank.tolist(), condition.tolist(), gaps, strict=True)
    return {module: StepReport(*column) for module, column in zip(modules, columns, strict=True)}


def rank_flags(
    layout: FactorLayout, steps: Mapping[str, StepReport], wording: str = "rank {} of {} kept"
) -> tuple[str, ...]:
    """One flag for each module of ``steps`` whose step kept fewer directions than ``A`` has rows.

    Args:
        layout: holds ``A`` of every module; flags come in the order of its modules.
        steps: module to its report.
        wording: of a flag, with places for the rank and the number of rows.
    """
    rows = {module: layout.by_name[f"{module}.A"].rows for module in layout.modules}
    return tuple(
        f"{module}: {wording.format(steps[module].rank, rows[module])}"
        for module in layout.modules
        if module in steps and steps[module].rank < rows[module]
    )
