"""The loop over module groups: run the method on a group's tensors, keep its result.

A method with a rule over whole adapters goes over all groups twice: first for the rule,
which sees the inner products of whole updates, then for its host, which sees what the rule leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.data.compatibility import token_rows
from fedcore.data.low_rank import LowRank
from fedcore.data.rows import tensor_in_row
from fedcore.errors import FedcoreError
from fedcore.merging.plan import Job
from fedcore.merging.reading import cohorts, dense_rows
from fedcore.merging.result import Merged
from fedcore.methods.base import Aggregate, Broadcast, Decision, Method, Rule
from fedcore.methods.robust.base import cohort_gram, follow
from fedcore_kernels import KernelInputError, weighted_mean

Progress = Callable[[int, int], None]
"""Called with how many of how many parts are done."""

Observe = Callable[[Cohort, Broadcast, Merged], None]
"""Called after each group with all of it, what it started from and everything merged so far."""


def _decide(job: Job, rule: Rule, step: Callable[[], None]) -> Decision:
    """What ``rule`` decides about the whole adapters of ``job``, in the order of its sources.

    Every group is read once; only the N x N inner products of its updates are kept.

    Args:
        step: called after every group.

    Raises:
        FedcoreError: too few adapters for the rule, before any is read; or as :func:`cohorts`.
    """
    clients = len(job.sources)
    rule.check_clients(clients)
    gram = torch.zeros(clients, clients, dtype=torch.float64)
    for cohort in cohorts(job):
        gram += cohort_gram(cohort)
        step()
    return rule.decide([source.name for source in job.sources], job.weights, gram)


def _broadcast(job: Job, cohort: Cohort) -> Broadcast:
    """The state that the method is to think the adapters started from."""
    layout = cohort.layout
    row = torch.zeros(layout.size, dtype=job.work_dtype)
    if job.previous is not None:
        job.previous.fill_row(layout, row)
    elif job.method.family == "gram":
        # Only looked at to see that it is not zero: nothing is aligned to it.
        row.fill_(1)
    else:
        frozen = job.method.frozen_layout(layout, 0)
        row = layout.scatter(row, frozen, layout.gather(cohort.updates[0], frozen))
    return Broadcast(layout, row)


def _written(job: Job, name: str, values: Tensor) -> Tensor:
    """A tensor of the result, with all scaling absorbed, as it is written."""
    unit, dtype = job.units.get(name.rpartition(".")[0], 1.0), job.dtypes[name]
    written = (values / unit if unit != 1.0 else values).to(dtype)
    if not bool(torch.isfinite(written).all()):
        raise FedcoreError(
            f"{name} of the result holds values up to {float(values.abs().max()):.3g}, which are "
            f"not finite in {dtype}; pass a wider dtype"
        )
    return written


def _collect(merged: Merged, job: Job, result: Aggregate, previous: Broadcast) -> None:
    """Put a group's result into ``merged``, at the ranks and in the dtypes that are written."""
    layout, row = previous.layout, result.row
    merged.flags += result.flags
    for module, part in result.residual.items():
        outer = _written(job, f"{module}.B", part.outer)
        merged.residual[module] = LowRank(outer, _written(job, f"{module}.A", part.inner))
    if job.method.capabilities.restarts:
        # The next round's random start means nothing here: the update is the residual.
        for module in layout.modules:
            if module not in merged.residual:
                outer, inner = (
                    torch.zeros(1, layout.by_name[name].width, dtype=job.dtypes[name])
                    for name in (f"{module}.B", f"{module}.A")
                )
                merged.residual[module] = LowRank(outer, inner)
        return
    ranks = {slot.module: job.ranks.get(slot.module, slot.rows) for slot in layout.factor_slots}
    if any(ranks[slot.module] != slot.rows for slot in layout.factor_slots):
        chosen = [job.ranks.get(module, 0) for module in layout.modules]
        row = job.method.for_client(Broadcast(layout, row), previous, chosen)
    for slot in layout.factor_slots:
        tensor = tensor_in_row(row, layout, slot.name, ranks[slot.module])
        merged.factors.setdefault(slot.module, {})[slot.factor] = _written(
            job, slot.name, tensor
        ).clone(memory_format=torch.contiguous_format)


def _token_mean(job: Job, name: str, weights: Tensor) -> Tensor:
    """Rows ``(tokens, d)`` of an embedding, each the mean of the adapters that train its token.

    An adapter that does not train a token does not hold its row, which is the base model's.

    Raises:
        FedcoreError: naming the adapter whose values are not finite; or nobody who trains a token
            has a weight.
    """
    tokens = job.tokens[name]
    place = {token: i for i, token in enumerate(tokens)}
    width = job.first.outline.dense[name].shape[1]
    total = torch.zeros(len(tokens), width, dtype=torch.float64)
    share = torch.zeros(len(tokens), dtype=torch.float64)
    for source, weight in zip(job.sources, weights.tolist(), strict=True):
        mine = token_rows(source.outline)[name]
        values = source.dense(name, 0, len(mine) * width).view(len(mine), width)
        places = torch.tensor([place[token] for token in mine])
        total.index_add_(0, places, values.double() * weight)
        share.index_add_(0, places, torch.full((len(mine),), weight, dtype=torch.float64))
    if bool((share <= 0).any()):
        lost = tokens[int((share <= 0).nonzero()[0])]
        raise FedcoreError(f"{name}: no adapter of positive weight trains the token {lost}")
    return _written(job, name, total / share[:, None])


def run_method(method: Method, cohort: Cohort, previous: Broadcast) -> Aggregate:
    """``method`` on whole uploads, of which it sees what its clients would send.

    Raises:
        FedcoreError: the method refuses the cohort, or cannot decompose its values.
    """
    sent = method.upload_layout(cohort.layout, 0)
    if sent != cohort.layout:
        updates = cohort.layout.gather(cohort.updates, sent)
        cohort = replace(cohort, layout=sent, updates=updates)
    try:
        return method.aggregate(cohort, previous)
    except (KernelInputError, torch.linalg.LinAlgError) as error:
        raise FedcoreError(f"{method.name}: {error}") from error


def merge(job: Job, observe: Observe | None, progress: Progress | None) -> Merged:
    """Aggregate all groups and average all dense tensors.

    Args:
        observe: sees what was merged beside all that it was merged from.

    Raises:
        FedcoreError: as :func:`cohorts`; or the method refuses, or its result is not finite.
    """
    rule = job.method.rule
    done, total = 0, len(job.groups) * (1 if rule is None else 2) + len(job.parts)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    decision = None if rule is None else _decide(job, rule, step)
    weights = job.weights if decision is None else decision.weights
    merged = Merged(flags=[] if decision is None else list(decision.flags))
    for cohort in cohorts(job):
        previous = _broadcast(job, cohort)
        counted = cohort if decision is None else follow(cohort, decision)
        _collect(merged, job, run_method(job.host, counted, previous), previous)
        if observe is not None:
            observe(cohort, previous, merged)
        step()
    means: dict[str, list[Tensor]] = {}
    # Those without a weight are read as well: they may not hold NaN either.
    weighted = weights > 0
    for part in job.parts:
        rows = dense_rows(job, part)
        rows = rows if bool(weighted.all()) else rows[weighted]
        means.setdefault(part.name, []).append(weighted_mean(rows, weights[weighted]))
        step()
    for name in job.tokens:
        merged.dense[name] = _token_mean(job, name, weights)
    for name, pieces in means.items():
        mean = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        shape = job.first.outline.dense[name].shape
        merged.dense[name] = _written(job, name, mean.view(shape))
    return merged
