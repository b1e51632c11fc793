"""From adapters as they are given to a job that is known to be sound, values aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import torch

from fedcore.checks import count
from fedcore.data.cohort import Cohort
from fedcore.data.validation import Dropped, OnInvalid
from fedcore.errors import FedcoreError
from fedcore.merging.reading import Job, dense_parts, module_groups, sound
from fedcore.merging.sources import (
    Adapter,
    Source,
    check_same_constants,
    open_source,
    own_problem,
    shared_problem,
)
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore.methods.requirements import (
    ANY_RANK,
    MIXED_RANKS,
    NO_PREVIOUS,
    NO_ROUNDS,
    methods_meeting,
    of_family,
    refuse,
)
from fedcore_kernels import KernelInputError
from fedcore_kernels.layout import FactorLayout


def aggregating(method: Method) -> Method:
    """The method that forms the result: the host of one with a rule, otherwise itself."""
    return method if method.rule is None else method.rule.inner()


def run_method(method: Method, cohort: Cohort, previous: Broadcast) -> Aggregate:
    """``method`` on whole uploads, of which it sees what its clients would send.

    Raises:
        FedcoreError: the method refuses the cohort, or cannot decompose its values.
    """
    sent = method.upload_layout(cohort.layout, 0)
    if sent != cohort.layout:
        updates = cohort.layout.gather(cohort.updates, sent)
        cohort = Cohort(
            sent, updates, cohort.weights, cohort.client_ids, 0, cohort.ranks, cohort.scalings
        )
    try:
        return method.aggregate(cohort, previous)
    except (KernelInputError, torch.linalg.LinAlgError) as error:
        raise FedcoreError(f"{method.name}: {error}") from error


def usable_methods(family: str | None = None, *, previous: bool = True) -> list[type[Method]]:
    """Methods that need no training history, of one adapter ``family`` if given.

    Args:
        previous: whether the adapter that all clients started from is there.
    """
    needs = [NO_ROUNDS]
    if family is not None:
        needs.append(of_family(family))
    if not previous:
        needs.append(NO_PREVIOUS)
    return [type(method) for method in methods_meeting(needs)]


def check_usable(method: Method, previous: bool, align: bool | None) -> Method:
    """The method as it runs on adapters alone.

    Args:
        previous: whether the adapter that all clients started from is there.
        align: what the caller said of the option ``align``, if anything.

    Returns:
        ``method``, without the alignment to a previous adapter where there is none.

    Raises:
        FedcoreError: naming the methods that can be used instead.
    """
    refuse(method, (NO_ROUNDS,), "adapters that were trained elsewhere")
    if not previous:
        needs = (NO_ROUNDS, NO_PREVIOUS, of_family(method.family))
        refuse(method, needs, "adapters without previous", "pass previous")
    if method.capabilities.history == "alignment" and not previous and _aligns(method):
        if align:
            raise FedcoreError(
                f"{method.name}: align is true without an adapter to align to; pass previous"
            )
        own = {field.name: getattr(method, field.name) for field in _fields(method)}
        return type(method)(**{**own, "align": False})
    return method


def names_of(methods: list[type[Method]]) -> str:
    """The names, separated by commas."""
    return ", ".join(method.name for method in methods)


def _aligns(method: Method) -> bool:
    return any(field.name == "align" and vars(method)[field.name] for field in _fields(method))


def _fields(method: Method) -> tuple[Field[Any], ...]:
    # Every subclass is a dataclass; the abstract base is not.
    return fields(method)  # type: ignore[arg-type]


def open_sources(
    named: Mapping[str, Adapter], weights: Mapping[str, float], on_invalid: OnInvalid, budget: int
) -> tuple[list[Source], list[Dropped]]:
    """Adapters of positive weight that can be averaged, in the order given, and the others.

    With ``on_invalid = "drop"`` every value is read once here; otherwise headers alone.

    Raises:
        FedcoreError: naming the first bad adapter, or that no adapter of positive weight is left.
    """
    sources: list[Source] = []
    problems: dict[str, str] = {}
    for name, adapter in named.items():
        try:
            source = open_source(name, adapter, budget, sources[0] if sources else None)
            known = bool(sources) and source.outline is sources[0].outline
            problem = None if known else own_problem(source.outline)
            if problem:
                raise FedcoreError(f"{name}: {problem}")
            sources.append(source)
        except FedcoreError as error:
            if on_invalid == "raise":
                raise
            problems[name] = str(error).removeprefix(f"{name}: ")
    if on_invalid == "drop":
        problems |= sound(sources, _work_dtype(sources))
    sources = [source for source in sources if source.name not in problems]
    if sources:
        layout = FactorLayout.build(
            [slot for group in module_groups(sources, None, 1, 1) for slot in group.slots],
            [(name, tuple(tensor.shape)) for name, tensor in sources[0].outline.dense.items()],
        )
        for source in sources[1:]:
            known = source.outline is sources[0].outline
            problem = None if known else shared_problem(source.outline, sources[0], layout)
            if problem and on_invalid == "raise":
                raise FedcoreError(f"{source.name}: {problem}")
            if problem:
                problems[source.name] = problem
    kept = [s for s in sources if s.name not in problems and weights[s.name] > 0]
    dropped = [Dropped(name, reason) for name, reason in problems.items()]
    dropped += [
        Dropped(s.name, "its weight is zero")
        for s in sources
        if s.name not in problems and not weights[s.name] > 0
    ]
    if not kept:
        first = min(dropped)
        raise FedcoreError(f"no adapter is left; {first.client_id}: {first.reason}")
    return kept, dropped


def plan_job(
    method: Method,
    sources: Sequence[Source],
    weights: Mapping[str, float],
    previous: Source | None,
    rank: int | None,
    group_bytes: int,
) -> Job:
    """What is to be done, group by group.

    Raises:
        FedcoreError: adapters of another family than the method's, of mixed ranks where it needs
            equal ones, with differing constants; a rank that it does not choose; a ``previous``
            that does not fit.
    """
    first = sources[0]
    family = first.outline.family
    if method.family != family:
        usable = names_of(usable_methods(family)) or "none"
        raise FedcoreError(
            f"{method.name} aggregates adapters of family {method.family!r}, these are of family "
            f"{family!r}; usable: {usable}"
        )
    if not method.capabilities.mixed_ranks:
        _check_equal_ranks(aggregating(method), sources)
    started = [] if previous is None else [previous]
    check_same_constants([*sources, *started])
    ranks = _ranks(aggregating(method), sources, previous, rank)
    dtype = _work_dtype([*sources, *started])
    every = [*sources, *started]
    groups = module_groups(every, max(ranks.values(), default=None), group_bytes, dtype.itemsize)
    if previous is not None:
        layout = FactorLayout.build(
            [slot for group in groups for slot in group.slots],
            [(name, tuple(tensor.shape)) for name, tensor in first.outline.dense.items()],
        )
        problem = shared_problem(previous.outline, first, layout)
        if problem:
            raise FedcoreError(f"{previous.name}: {problem}")
    ordered = sorted(sources, key=lambda source: source.name)
    return Job(
        method=method,
        first=first,
        sources=tuple(ordered),
        weights=torch.tensor([weights[s.name] for s in ordered], dtype=torch.float64),
        previous=previous,
        ranks=ranks,
        groups=tuple(groups),
        parts=tuple(dense_parts(first.outline, len(sources), group_bytes, dtype.itemsize)),
        work_dtype=dtype,
    )


def _work_dtype(sources: Sequence[Source]) -> torch.dtype:
    wide = any(source.outline.dtype == torch.float64 for source in sources)
    return torch.float64 if wide else torch.float32


def _check_equal_ranks(method: Method, sources: Sequence[Source]) -> None:
    first = sources[0]
    for source in sources[1:]:
        for module in first.outline.factors:
            one, other = source.ranks[module], first.ranks[module]
            if one != other:
                needs = (MIXED_RANKS, NO_ROUNDS, of_family(method.family))
                ranks = f"{module} has rank {one}, that of {first.name} is {other}"
                refuse(method, needs, f"{source.name}: {ranks}")


def _ranks(
    method: Method, sources: Sequence[Source], previous: Source | None, rank: int | None
) -> dict[str, int]:
    """Module to the rank of the result, where one was asked for."""
    if rank is None:
        return {}
    count("", "rank", rank, least=1)
    needs = (ANY_RANK, NO_ROUNDS, of_family(method.family))
    refuse(method, needs, f"rank is {rank}", "leave it out")
    if method.family == "gram" and previous is not None:
        raise FedcoreError(
            f"rank is {rank}; factors that are aligned to previous keep its rank, leave rank out"
        )
    found = {}
    for module, named in sources[0].outline.factors.items():
        stacked = sum(source.ranks[module] for source in sources)
        widths = [named["A"].shape[1], *([named["B"].shape[0]] if "B" in named else [])]
        found[module] = min(rank, stacked, *widths)
    return found
