"""Uploads that hold cores and no bases."""

from __future__ import annotations

from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout


def check_cores(layout: FactorLayout, expected: FactorLayout, method: str) -> None:
    """Refuse uploads of any other layout than ``expected``.

    Raises:
        FedcoreError: naming the first tensor that differs.
    """
    if layout == expected:
        return
    sent, wanted = (
        {slot.name: slot.shape or (slot.rows, slot.width) for slot in found}
        for found in (layout, expected)
    )
    differing = [name for name in sorted(sent | wanted) if sent.get(name) != wanted.get(name)]
    what = differing[0] if differing else "a tensor"
    raise FedcoreError(
        f"{method} needs exactly {_listed(expected)} in an upload; {what} is missing, too much, of "
        "another shape than in the broadcast or elsewhere in the row"
    )


def _listed(expected: FactorLayout) -> str:
    return "the core R of every module" + (", and the head" if expected.dense_slots else "")
