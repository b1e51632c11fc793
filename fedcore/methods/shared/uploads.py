"""What the uploads of a round hold: refused, averaged or completed before they are aggregated."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods.base import Broadcast
from fedcore_kernels import FactorLayout, weighted_mean


def check_whole_upload(cohort: Cohort, previous: Broadcast, method: str) -> None:
    """Refuse uploads that do not hold exactly what was broadcast.

    Raises:
        FedcoreError: naming the first tensor that differs.
    """
    needed = f"round {cohort.round}: {method} needs every trained tensor as it was broadcast"
    _check_layout(cohort.layout, previous.layout, needed)


def check_cores(layout: FactorLayout, expected: FactorLayout, method: str) -> None:
    """Refuse uploads of any other layout than ``expected``, which holds cores and maybe the head.

    Raises:
        FedcoreError: naming the first tensor that differs.
    """
    head = ", and the head" if expected.dense_slots else ""
    _check_layout(layout, expected, f"{method} needs exactly the core R of every module{head}")


def _check_layout(layout: FactorLayout, expected: FactorLayout, needed: str) -> None:
    if layout == expected:
        return
    sent, wanted = _shapes(layout), _shapes(expected)
    differing = [name for name in sorted(sent | wanted) if sent.get(name) != wanted.get(name)]
    tensor = differing[0] if differing else "a tensor"
    raise FedcoreError(
        f"{needed}; {tensor} is missing, unexpected, of another shape or elsewhere in the row"
    )


def _shapes(layout: FactorLayout) -> dict[str, tuple[int, ...]]:
    return {slot.name: slot.shape or (slot.rows, slot.width) for slot in layout}


def with_dense_means(cohort: Cohort, previous: Broadcast) -> Tensor:
    """A copy of the broadcast row ``(P,)`` whose dense tensors are the clients' weighted means."""
    row = previous.row.clone()
    for slot in cohort.layout.dense_slots:
        columns = slice(slot.offset, slot.offset + slot.numel)
        row[columns] = weighted_mean(cohort.updates[:, columns], cohort.weights).to(row.dtype)
    return row


def with_broadcast_rows(cohort: Cohort, previous: Broadcast) -> Cohort:
    """The cohort with the broadcast's rows where a client of lower rank has none of its own.

    Such a client trains the leading rows and leaves the others as they are. Averaging its missing
    rows as zeros would shrink them by their coverage in every round until the model has lost that
    rank; with the broadcast's in their place the mean of the uploads is the broadcast plus the mean
    of what the clients changed.

    Args:
        cohort: its layout holds factors of ``previous``, at the same ranks.

    Returns:
        A cohort of full rank; ``cohort`` itself where no rank is lower.
    """
    if not len(cohort) or not cohort.mixed_ranks:
        return cohort
    layout, updates, ranks = cohort.layout, cohort.updates.clone(), cohort.ranks.clone()
    for j, module in enumerate(layout.modules):
        for slot in layout.factor_slots:
            if slot.module != module:
                continue
            start = previous.layout.view(previous.row, previous.layout.by_name[slot.name])
            for n in (cohort.ranks[:, j] < slot.rows).nonzero()[:, 0].tolist():
                rank = int(cohort.ranks[n, j])
                layout.view(updates[n], slot)[rank:] = start[rank:].to(updates.dtype)
            ranks[:, j] = slot.rows
    return replace(cohort, updates=updates, ranks=ranks)
