"""What ``fedcore bench kernels`` measures: every public operation on its own."""

from __future__ import annotations

from bench.case import Plan
from bench.ops import alignment, isometries, means, products, spectra, stacks, steps
from bench.workloads import Setting

FAMILIES = (means, stacks, steps, alignment, products, spectra, isometries)


def plans(setting: Setting) -> list[Plan]:
    """All families' cases, in the order in which they are measured."""
    return [plan for family in FAMILIES for plan in family.plans(setting)]
