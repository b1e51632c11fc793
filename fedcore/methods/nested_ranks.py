"""Clients of lower rank that hold the leading rows of common factors."""

from __future__ import annotations

from dataclasses import replace

from fedcore.data.cohort import Cohort
from fedcore.methods.base import Broadcast


def with_held_rows(cohort: Cohort, previous: Broadcast) -> Cohort:
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
            held = previous.layout.view(previous.row, previous.layout.by_name[slot.name])
            for n in (cohort.ranks[:, j] < slot.rows).nonzero()[:, 0].tolist():
                rank = int(cohort.ranks[n, j])
                layout.view(updates[n], slot)[rank:] = held[rank:].to(updates.dtype)
            ranks[:, j] = slot.rows
    return replace(cohort, updates=updates, ranks=ranks)
