"""From opened adapters to a job: fit for each other, for the method, and cut into groups.

The outlines of all adapters are compared before the first value is read. Then the modules are cut
into groups and the dense tensors into parts, so that one group of all adapters fits the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import cached_property
from itertools import chain
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fedcore.checks import count
from fedcore.data.rows import widest_layout
from fedcore.data.validation import Dropped, OnInvalid
from fedcore.errors import FedcoreError
from fedcore.merging.sources import (
    Adapter,
    Source,
    adapter_problem,
    check_same_constants,
    mismatch,
    open_source,
)
from fedcore.methods.base import Method
from fedcore.methods.requirements import (
    ANY_RANK,
    MIXED_RANKS,
    NO_PREVIOUS,
    NO_ROUNDS,
    methods_meeting,
    of_family,
    refuse,
)
from fedcore_kernels.layout import FactorLayout

DEFAULT_GROUP_BYTES = 64 << 20
"""Bytes of one group's rows, all adapters together."""


@dataclass(frozen=True)
class DensePart:
    """Elements ``start`` to ``stop`` of a dense tensor, in row-major order."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first value is read.

    Attributes:
        method: as it runs without rounds.
        host: the method that forms the result: the host of one with a rule, otherwise ``method``.
        first: gives configuration, keys and dtypes; one of ``sources``.
        sources: N adapters of positive weight, by name; they agree with each other.
        weights: ``(N,)`` fp64, positive.
        previous: the adapter that all of them started from, where the method can use it.
        ranks: module to the rank of the result, for methods that choose it.
        groups: the factors of the modules that are aggregated together.
        parts: the dense tensors, in pieces that are averaged together.
        work_dtype: fp32, or fp64 if any tensor is.
        dtypes: full name of every tensor of the result to its dtype.
    """

    method: Method
    host: Method
    first: Source
    sources: tuple[Source, ...]
    weights: Tensor
    previous: Source | None
    ranks: Mapping[str, int]
    groups: tuple[FactorLayout, ...]
    parts: tuple[DensePart, ...]
    work_dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]

    @cached_property
    def offset(self) -> bool:
        """Whether the adapters are relative to an initial Gram factor, which is stored unscaled."""
        outline = self.first.outline
        return outline.family == "gram" and bool(outline.config.get("offset", True))

    @cached_property
    def scaling(self) -> dict[str, float]:
        """Module to the scaling that the result is written with, 1 wherever it can be absorbed.

        Beside an offset it cannot: the scaling that all adapters share has to stay.
        """
        outline = self.first.outline
        return dict(outline.scaling) if self.offset else dict.fromkeys(outline.factors, 1.0)

    @cached_property
    def units(self) -> dict[str, float]:
        """Module to what a written Gram factor is multiplied by to absorb its scaling."""
        if self.method.family != "gram":
            return {}
        return {module: sqrt(scaling) for module, scaling in self.scaling.items()}


def _work_dtype(sources: Sequence[Source]) -> torch.dtype:
    wide = any(source.outline.dtype == torch.float64 for source in sources)
    return torch.float64 if wide else torch.float32


def _widest(sources: Sequence[Source], rank: int | None = None) -> FactorLayout:
    """The tensors of the first source at the largest rank of any, and at ``rank`` if larger."""
    ranks = [source.ranks for source in sources]
    if rank is not None:
        ranks.append(dict.fromkeys(ranks[0], rank))
    return widest_layout(sources[0].outline.layout(), ranks)


def _groups(layout: FactorLayout, row_bytes: int, group_bytes: int) -> Iterator[FactorLayout]:
    """The modules of ``layout`` in the order of their names, which is the order of files.

    Args:
        row_bytes: of one element of all adapters.
        group_bytes: of all adapters' rows of a group, which holds one module at least.
    """
    slots: dict[str, list[str]] = {module: [] for module in layout.modules}
    sizes = dict.fromkeys(slots, 0)
    for slot in layout.factor_slots:
        slots[slot.module].append(slot.name)
        sizes[slot.module] += slot.numel * row_bytes
    names: list[str] = []
    used = 0
    for module, size in sizes.items():
        if names and used + size > group_bytes:
            yield layout.part(names)
            names, used = [], 0
        names += slots[module]
        used += size
    if names:
        yield layout.part(names)


def _parts(layout: FactorLayout, row_bytes: int, group_bytes: int) -> Iterator[DensePart]:
    """The dense tensors of ``layout``, in pieces of which one of each adapter fits the budget."""
    length = max(1, group_bytes // row_bytes)
    for slot in layout.dense_slots:
        for start in range(0, slot.numel, length):
            yield DensePart(slot.name, start, min(start + length, slot.numel))


def _value_problem(source: Source, dtype: torch.dtype) -> str | None:
    """Read every value of a source once; what is wrong with the first bad one, if any."""
    layout = source.outline.layout()
    try:
        for group in _groups(layout, dtype.itemsize, DEFAULT_GROUP_BYTES):
            source.fill_row(group, torch.zeros(group.size, dtype=dtype))
        for part in _parts(layout, dtype.itemsize, DEFAULT_GROUP_BYTES):
            source.dense(part.name, part.start, part.stop)
    except FedcoreError as error:
        return str(error).removeprefix(f"{source.name}: ")
    return None


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
    """Module to the rank of the result, where the caller chose one."""
    if rank is None:
        return {}
    count("", "rank", rank, least=1)
    needs = (ANY_RANK, NO_ROUNDS, of_family(method.family))
    refuse(method, needs, f"rank is {rank}", "leave it out")
    if method.family == "gram" and previous is not None:
        raise FedcoreError(
            f"rank is {rank}; factors that are aligned to previous keep its rank, leave rank out"
        )
    chosen = {}
    for module, named in sources[0].outline.factors.items():
        stacked = sum(source.ranks[module] for source in sources)
        widths = [named["A"].shape[1], *([named["B"].shape[0]] if "B" in named else [])]
        chosen[module] = min(rank, stacked, *widths)
    return chosen


def _result_dtypes(first: Source, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    outline = first.outline
    dtypes = {
        f"{module}.{factor}": tensor.dtype
        for module, named in outline.factors.items()
        for factor, tensor in named.items()
    }
    dtypes |= {name: tensor.dtype for name, tensor in outline.dense.items()}
    return dtypes if dtype is None else dict.fromkeys(dtypes, dtype)


def methods_for_merging(family: str | None = None, *, previous: bool = True) -> list[type[Method]]:
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
        options = {field.name: getattr(method, field.name) for field in _fields(method)}
        return type(method)(**{**options, "align": False})
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
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    on_invalid: OnInvalid,
    budget: int,
) -> tuple[list[Source], list[Dropped]]:
    """Adapters of positive weight that can be averaged, in the order given, and the others.

    With ``on_invalid = "drop"`` every value is read once here; otherwise only headers.

    Raises:
        FedcoreError: naming the first bad adapter, or that no adapter of positive weight is left.
    """
    sources: list[Source] = []
    problems: dict[str, str] = {}
    for name, adapter in adapters.items():
        first = sources[0] if sources else None
        try:
            source = open_source(name, adapter, budget, first)
            # An outline that is shared with the first adapter has been looked at.
            known = first is not None and source.outline is first.outline
            problem = None if known else adapter_problem(source.outline)
            if problem:
                raise FedcoreError(f"{name}: {problem}")
            sources.append(source)
        except FedcoreError as error:
            if on_invalid == "raise":
                raise
            problems[name] = str(error).removeprefix(f"{name}: ")
    if on_invalid == "drop":
        dtype = _work_dtype(sources)
        checked = {source.name: _value_problem(source, dtype) for source in sources}
        problems |= {name: problem for name, problem in checked.items() if problem}
        sources = [source for source in sources if source.name not in problems]
    layout = _widest(sources) if sources else FactorLayout(())
    for source in sources[1:]:
        known = source.outline is sources[0].outline
        problem = None if known else mismatch(source.outline, sources[0], layout)
        if problem and on_invalid == "raise":
            raise FedcoreError(f"{source.name}: {problem}")
        if problem:
            problems[source.name] = problem
    fitting = [source for source in sources if source.name not in problems]
    weighted = [source for source in fitting if weights[source.name] > 0]
    weightless = {s.name: "its weight is zero" for s in fitting if not weights[s.name] > 0}
    dropped = [Dropped(*item) for item in chain(problems.items(), weightless.items())]
    if not weighted:
        first_dropped = min(dropped)
        raise FedcoreError(f"no adapter is left; {first_dropped.client_id}: {first_dropped.reason}")
    return weighted, dropped


def plan_job(
    method: Method,
    sources: Sequence[Source],
    weights: Mapping[str, float],
    *,
    previous: Source | None,
    rank: int | None,
    dtype: torch.dtype | None,
    group_bytes: int,
) -> Job:
    """What is to be done, group by group.

    Args:
        rank: of the result, where the caller chose one.
        dtype: of the result; that of the first adapter if None.

    Raises:
        FedcoreError: adapters of another family than the method's, of mixed ranks where it needs
            equal ones, with differing constants; a rank that it does not choose; a ``previous``
            that does not fit.
    """
    first = sources[0]
    family = first.outline.family
    if method.family != family:
        usable = names_of(methods_for_merging(family)) or "none"
        raise FedcoreError(
            f"{method.name} aggregates adapters of family {method.family!r}, these are of family "
            f"{family!r}; usable: {usable}"
        )
    host = method if method.rule is None else method.rule.inner()
    if not method.capabilities.mixed_ranks:
        _check_equal_ranks(host, sources)
    every = [*sources, *([] if previous is None else [previous])]
    check_same_constants(every)
    ranks = _ranks(host, sources, previous, rank)
    layout = _widest(every, max(ranks.values(), default=None))
    if previous is not None:
        problem = mismatch(previous.outline, first, layout)
        if problem:
            raise FedcoreError(f"{previous.name}: {problem}")
    work_dtype = _work_dtype(every)
    ordered = sorted(sources, key=lambda source: source.name)
    return Job(
        method=method,
        host=host,
        first=first,
        sources=tuple(ordered),
        weights=torch.tensor([weights[s.name] for s in ordered], dtype=torch.float64),
        previous=previous,
        ranks=ranks,
        groups=tuple(_groups(layout, len(every) * work_dtype.itemsize, group_bytes)),
        parts=tuple(_parts(layout, len(sources) * work_dtype.itemsize, group_bytes)),
        work_dtype=work_dtype,
        dtypes=_result_dtypes(first, dtype),
    )
