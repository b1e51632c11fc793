"""The loop over module groups: run the method on a group's tensors, keep its result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.data.low_rank import LowRank
from fedcore.merging.error_table import ErrorTally
from fedcore.merging.plan import aggregating, run_method
from fedcore.merging.reading import DensePart, Job, ModuleGroup, cohorts, fill_row, finite
from fedcore.merging.result import Merged
from fedcore.methods.base import Aggregate, Broadcast, Decision, Rule
from fedcore.methods.robust.base import cohort_gram, follow
from fedcore_kernels import weighted_mean
from fedcore_kernels.layout import FactorLayout


def decide(job: Job, rule: Rule, step: Callable[[], None]) -> Decision:
    """What ``rule`` decides about the whole adapters of ``job``, in the order of its sources.

    Every group is read once and leaves the N x N inner products of its updates alone.

    Args:
        step: called after every group.

    Raises:
        FedcoreError: too few adapters for the rule, before any is read; or as :func:`cohorts`.
    """
    clients = len(job.sources)
    rule.check_clients(clients)
    gram = torch.zeros(clients, clients, dtype=torch.float64)
    for _, cohort in cohorts(job):
        gram += cohort_gram(cohort)
        step()
    return rule.decide([source.name for source in job.sources], job.weights, gram)


Progress = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def merge(
    job: Job,
    cast: Callable[[str, Tensor], Tensor],
    tally: ErrorTally | None,
    progress: Progress | None,
) -> Merged:
    """Aggregate all groups and average all dense tensors.

    A method with a rule over whole adapters reads all groups twice: first for the rule alone, then
    for its host, which is given what the rule leaves of each. The tally is given all of it.

    Args:
        cast: a tensor's full name and its value to what is written.
        tally: takes the errors of the method and of its alternatives.

    Raises:
        FedcoreError: as :func:`cohorts`; or the method refuses, or its result is not finite.
    """
    rule, host = job.method.rule, aggregating(job.method)
    done, total = 0, len(job.groups) * (1 if rule is None else 2) + len(job.parts)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    decision = None if rule is None else decide(job, rule, step)
    weights = job.weights if decision is None else decision.weights
    merged = Merged(flags=[] if decision is None else list(decision.flags))
    for group, cohort in cohorts(job):
        previous = _broadcast(job, group, cohort)
        counted = cohort if decision is None else follow(cohort, decision)
        result = run_method(host, counted, previous)
        row = _of_ranks(job, group.layout, result.row, previous)
        _collect(merged, job, group.layout, row, result, cast)
        if tally is not None:
            tally.add(job.method, cohort, previous, merged)
        step()
    whole: dict[str, list[Tensor]] = {}
    for part in job.parts:
        whole.setdefault(part.name, []).append(_dense_mean(job, part, weights))
        step()
    shapes = job.first.outline.dense
    for name, pieces in whole.items():
        mean = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        merged.dense[name] = cast(name, mean.view(shapes[name].shape))
    return merged


def _broadcast(job: Job, group: ModuleGroup, cohort: Cohort) -> Broadcast:
    """The state that the method is to think the adapters started from."""
    layout = group.layout
    if job.previous is not None:
        row = torch.zeros(layout.size, dtype=job.work_dtype)
        fill_row(job.previous, group, row)
        return Broadcast(layout, row)
    if job.method.family == "gram":
        # Only looked at to see that it is not zero: nothing is aligned to it.
        return Broadcast(layout, torch.ones(layout.size, dtype=job.work_dtype))
    row = torch.zeros(layout.size, dtype=job.work_dtype)
    frozen = job.method.frozen_layout(layout, 0)
    return Broadcast(layout, layout.scatter(row, frozen, layout.gather(cohort.updates[0], frozen)))


def _of_ranks(job: Job, layout: FactorLayout, row: Tensor, previous: Broadcast) -> Tensor:
    ranks = [job.ranks.get(module, 0) for module in layout.modules]
    rows = {slot.module: slot.rows for slot in layout.factor_slots}
    if all(not rank or rank == rows[m] for m, rank in zip(layout.modules, ranks, strict=True)):
        return row
    return job.method.for_client(Broadcast(layout, row), previous, ranks)


def _collect(
    merged: Merged,
    job: Job,
    layout: FactorLayout,
    row: Tensor,
    result: Aggregate,
    cast: Callable[[str, Tensor], Tensor],
) -> None:
    merged.flags += result.flags
    for module, part in result.residual.items():
        merged.residual[module] = LowRank(
            cast(f"{module}.B", part.outer), cast(f"{module}.A", part.inner)
        )
    if job.method.capabilities.restarts:
        # The next round's random start means nothing here: the update is the residual.
        for module in layout.modules:
            if module not in merged.residual:
                names = f"{module}.B", f"{module}.A"
                nothing = (row.new_zeros(1, layout.by_name[name].width) for name in names)
                merged.residual[module] = LowRank(*map(cast, names, nothing))
        return
    for slot in layout.factor_slots:
        rank = job.ranks.get(slot.module, slot.rows)
        values = cast(slot.name, layout.view(row, slot)[:rank])
        oriented = values.T if slot.factor == "B" else values
        merged.factors.setdefault(slot.module, {})[slot.factor] = oriented.clone(
            memory_format=torch.contiguous_format
        )


def _dense_mean(job: Job, part: DensePart, weights: Tensor) -> Tensor:
    """The mean of those with a weight; the others are looked at, and may not hold NaN either."""
    values = torch.empty(len(job.sources), part.stop - part.start, dtype=job.work_dtype)
    for row, source in zip(values, job.sources, strict=True):
        row.copy_(source.dense(part.name, part.start, part.stop))
        finite(source.name, part.name, row)
    kept = weights > 0
    return weighted_mean(values if bool(kept.all()) else values[kept], weights[kept])
