"""From opened adapters to a job: fit for each other, for the method, and cut into groups.

The outlines of all adapters are compared before the first value is read. Then the modules are cut
into groups and the dense tensors into parts, so that one group of all adapters fits the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import sqrt

import torch
from torch import Tensor

from fedcore.checks import count
from fedcore.data.adapter_kind import not_additive
from fedcore.data.compatibility import adapter_problem, mismatch, token_rows
from fedcore.data.rows import rank_and_width
from fedcore.data.validation import Dropped, OnInvalid
from fedcore.errors import FedcoreError
from fedcore.merging.groups import (
    DEFAULT_GROUP_BYTES,
    DensePart,
    different,
    groups_of,
    parts_of,
    widest,
    work_dtype,
)
from fedcore.merging.sources import (
    Adapter,
    Source,
    check_same_constants,
    open_source,
)
from fedcore.merging.usable import methods_for_merging, names_of
from fedcore.methods.base import Method
from fedcore.methods.requirements import (
    ANY_RANK,
    MIXED_RANKS,
    NO_ROUNDS,
    of_family,
    refuse,
)
from fedcore_kernels.layout import FactorLayout


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
        tokens: name of each tensor of embedding rows to the tokens of the result, in order.
        base: the base model's name in the result, where the caller gave one.
        patterns: whether modules keep ranks of their own in the result.
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
    tokens: Mapping[str, tuple[int, ...]]
    base: str | None
    patterns: bool
    work_dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]

    @cached_property
    def common_tokens(self) -> bool:
        """Whether all adapters train rows of the same tokens."""
        wanted = {name: len(tokens) for name, tokens in self.tokens.items()}
        return all(
            {name: len(tokens) for name, tokens in token_rows(source.outline).items()} == wanted
            for source in self.sources
        )

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


def _value_problem(source: Source, dtype: torch.dtype) -> str | None:
    """Read every value of a source once; what is wrong with the first bad one, if any."""
    layout = source.outline.layout()
    try:
        for group in groups_of(layout, dtype.itemsize, DEFAULT_GROUP_BYTES):
            source.fill_row(group, torch.zeros(group.size, dtype=dtype))
        for part in parts_of(layout, dtype.itemsize, DEFAULT_GROUP_BYTES):
            source.dense(part.name, part.start, part.stop)
    except FedcoreError as error:
        return str(error).removeprefix(f"{source.name}: ")
    return None


def _united_tokens(sources: Sequence[Source]) -> dict[str, tuple[int, ...]]:
    """Name of each tensor of embedding rows to the tokens that any adapter trains, in order."""
    united: dict[str, set[int]] = {}
    for source in sources:
        for name, tokens in token_rows(source.outline).items():
            united.setdefault(name, set()).update(tokens)
    return {name: tuple(sorted(tokens)) for name, tokens in united.items()}


def _rank_problem(source: Source, least: Mapping[str, int]) -> str | None:
    """A rank that no product of its shape can have and that all other rows would be padded to.

    Args:
        least: module to the smallest rank of any adapter.
    """
    for module, named in source.outline.factors.items():
        rank = source.ranks[module]
        width = min(rank_and_width(factor, tensor)[1] for factor, tensor in named.items())
        if rank > least.get(module, rank) and rank > width:
            return (
                f"module {module} has rank {rank}, where its product has {width} at most and other "
                f"adapters have rank {least[module]}; bring it down (fedcore aggregate of this "
                f"adapter alone, with --rank {width}) before it is merged"
            )
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


def _check_additive(host: Method, first: Source) -> None:
    problem = not_additive(first.outline.config)
    if problem and host.capabilities.updates_base and not host.capabilities.restarts:
        raise FedcoreError(
            f"{host.name} leaves a residual beside the adapter, and {problem}; use another method"
        )


def _result_dtypes(first: Source, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    outline = first.outline
    dtypes = {
        f"{module}.{factor}": tensor.dtype
        for module, named in outline.factors.items()
        for factor, tensor in named.items()
    }
    dtypes |= {name: tensor.dtype for name, tensor in outline.dense.items()}
    return dtypes if dtype is None else dict.fromkeys(dtypes, dtype)


def _opened(
    adapters: Mapping[str, Adapter], on_invalid: OnInvalid, budget: int
) -> tuple[list[Source], dict[str, str]]:
    """Adapters that are fit by themselves, and what is wrong with the others, by name."""
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
        dtype = work_dtype(sources)
        checked = {source.name: _value_problem(source, dtype) for source in sources}
        problems |= {name: problem for name, problem in checked.items() if problem}
    return [source for source in sources if source.name not in problems], problems


def _misfits(sources: Sequence[Source], same_base: bool) -> Iterator[tuple[str, str]]:
    """The adapters that do not fit the first, or the ranks of all, with the reason."""
    layout = widest(sources) if sources else FactorLayout(())
    least: dict[str, int] = {}
    for source in different(sources):
        for module, rank in source.ranks.items():
            least[module] = min(rank, least.get(module, rank))
    problems: dict[int, str | None] = {}
    for source in different(sources):
        problem = _rank_problem(source, least)
        if problem is None and source is not sources[0]:
            problem = mismatch(
                source.outline, sources[0].outline, sources[0].name, layout, same_base=same_base
            )
        problems[id(source.outline)] = problem
    for source in sources:
        problem = problems[id(source.outline)]
        if problem:
            yield source.name, problem


def open_sources(
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    on_invalid: OnInvalid,
    budget: int,
    same_base: bool,
) -> tuple[list[Source], list[Dropped]]:
    """Adapters of positive weight that can be averaged, in the order given, and the others.

    With ``on_invalid = "drop"`` every value is read once here; otherwise only headers.

    Args:
        same_base: whether the caller vouches for the base models to be one.

    Raises:
        FedcoreError: naming the first bad adapter, or that no adapter of positive weight is left.
    """
    sources, problems = _opened(adapters, on_invalid, budget)
    for name, problem in _misfits(sources, same_base):
        if on_invalid == "raise":
            raise FedcoreError(f"{name}: {problem}")
        problems[name] = problem
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
    base: str | None,
    same_base: bool,
    patterns: bool,
) -> Job:
    """What is to be done, group by group.

    Args:
        rank: of the result, where the caller chose one.
        dtype: of the result; that of the first adapter if None.
        base: the base model's name in the result, if the caller gave one.
        same_base: whether the caller vouches for the base models to be one.
        patterns: whether modules may have ranks of their own in the result.

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
    layout = widest(every, max(ranks.values(), default=None))
    if previous is not None:
        problem = mismatch(previous.outline, first.outline, first.name, layout, same_base=same_base)
        if problem:
            raise FedcoreError(f"{previous.name}: {problem}")
    _check_additive(host, first)
    dtype_of_rows = work_dtype(every)
    tokens = _united_tokens(sources)
    ordered = sorted(sources, key=lambda source: source.name)
    return Job(
        method=method,
        host=host,
        first=first,
        sources=tuple(ordered),
        weights=torch.tensor([weights[s.name] for s in ordered], dtype=torch.float64),
        previous=previous,
        ranks=ranks,
        groups=tuple(groups_of(layout, len(every) * dtype_of_rows.itemsize, group_bytes)),
        parts=tuple(parts_of(layout, len(sources) * dtype_of_rows.itemsize, group_bytes, tokens)),
        tokens=tokens,
        base=base,
        patterns=patterns or family != "lora",
        work_dtype=dtype_of_rows,
        dtypes=_result_dtypes(first, dtype),
    )
