"""From files to cohorts: the modules of all adapters, one group after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort
from fedcore.data.rows import absorb_scalings, tensor_in_row
from fedcore.data.validation import check_row
from fedcore.errors import FedcoreError
from fedcore.merging.sources import Source
from fedcore.methods.base import Method
from fedcore_kernels.layout import FactorLayout

DEFAULT_GROUP_BYTES = 64 << 20
"""Bytes of one group's rows, all adapters together."""


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that are aggregated together, in the layout of their factors."""

    modules: tuple[str, ...]
    layout: FactorLayout

    @property
    def slots(self) -> list[tuple[str, str, int, int]]:
        """Module, factor, rank and width of every factor."""
        return [(s.module, s.factor, s.rows, s.width) for s in self.layout.factor_slots]


@dataclass(frozen=True)
class DensePart:
    """Elements ``start`` to ``stop`` of a dense tensor, in row-major order."""

    name: str
    start: int
    stop: int


def module_groups(
    sources: Sequence[Source], rank: int | None, group_bytes: int, itemsize: int
) -> list[ModuleGroup]:
    """All modules in the order of their names, which is the order in which files hold them.

    Each factor has the largest rank that any adapter has in the module, and ``rank`` if that is
    larger. A group holds one module at least.
    """
    first, ranks = sources[0].outline, [source.ranks for source in sources]
    slots = {
        module: [
            (slot.factor, max(rank or 0, *(own.get(module, 0) for own in ranks)), slot.width)
            for slot in AdapterState(first.family, {module: first.factors[module]}).layout()
        ]
        for module in sorted(first.factors)
    }
    found: list[list[str]] = []
    used = 0
    for module, factors in slots.items():
        size = len(sources) * itemsize * sum(rows * width for _, rows, width in factors)
        if not found or used + size > group_bytes:
            found.append([])
            used = 0
        found[-1].append(module)
        used += size
    return [
        ModuleGroup(
            tuple(names),
            FactorLayout.build([(name, *slot) for name in names for slot in slots[name]]),
        )
        for names in found
    ]


def dense_parts(
    state: AdapterState, adapters: int, group_bytes: int, itemsize: int
) -> list[DensePart]:
    """All dense tensors, in pieces of which one of each adapter fits the budget."""
    length = max(1, group_bytes // (adapters * itemsize))
    return [
        DensePart(name, start, min(start + length, tensor.numel()))
        for name, tensor in sorted(state.dense.items())
        for start in range(0, tensor.numel(), length)
    ]


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first value is read.

    Attributes:
        method: as it runs without rounds.
        first: gives configuration, keys and dtypes; one of ``sources``.
        sources: N adapters of positive weight, by name; they agree with each other.
        weights: ``(N,)`` fp64, positive.
        previous: the adapter that all of them started from, where the method can use it.
        ranks: module to the rank of the result, for methods that choose it.
        work_dtype: fp32, or fp64 if any tensor is.
    """

    method: Method
    first: Source
    sources: tuple[Source, ...]
    weights: Tensor
    previous: Source | None
    ranks: Mapping[str, int]
    groups: tuple[ModuleGroup, ...]
    parts: tuple[DensePart, ...]
    work_dtype: torch.dtype


def fill_row(source: Source, group: ModuleGroup, out: Tensor) -> dict[str, Tensor]:
    """Write a group's factors of one adapter into the row ``out``, scalings absorbed.

    Rows beyond the adapter's rank, and what lies between tensors, are left as they are.

    Returns:
        The factors by their full names, as they were read.

    Raises:
        FedcoreError: naming adapter, tensor and value where one is not finite.
    """
    outline = source.outline
    found = source.read(slot.name for slot in group.layout)
    for slot in group.layout:
        view = tensor_in_row(out, group.layout, slot.name, source.ranks[slot.module])
        view.copy_(found[slot.name])
    absorb_scalings(out, group.layout, outline.family, outline.scaling)
    problem = check_row(out, group.layout)
    if problem:
        raise FedcoreError(f"{source.name}: {problem}")
    return found


def cohorts(job: Job) -> Iterator[tuple[ModuleGroup, Cohort]]:
    """Group after group as a cohort of its own; only one is held at a time.

    Raises:
        FedcoreError: naming the adapter whose values are not finite, or whose factors differ where
            the method needs a common one.
    """
    for group in job.groups:
        layout = group.layout
        updates = _empty_rows(job, group)
        first: dict[str, Tensor] = {}
        held = {slot.name for slot in job.method.frozen_layout(layout, 0)}
        for row, source in zip(updates, job.sources, strict=True):
            found = fill_row(source, group, row)
            if held and not first:
                first = {name: found[name] for name in sorted(held)}
            _check_common(job, source, first, found)
        yield group, _cohort(job, group, updates)


def _empty_rows(job: Job, group: ModuleGroup) -> Tensor:
    """Rows for all adapters, zero unless every element will be written."""
    layout = group.layout
    whole = layout.numel == layout.size and all(
        source.ranks[slot.module] == slot.rows
        for source in job.sources
        for slot in layout.factor_slots
    )
    make = torch.empty if whole else torch.zeros
    return make(len(job.sources), layout.size, dtype=job.work_dtype)


def _cohort(job: Job, group: ModuleGroup, updates: Tensor) -> Cohort:
    modules = group.layout.modules
    return Cohort(
        layout=group.layout,
        updates=updates,
        weights=job.weights,
        client_ids=tuple(source.name for source in job.sources),
        round=0,
        ranks=torch.tensor([[s.ranks[module] for module in modules] for s in job.sources]),
        scalings=torch.tensor(
            [[s.outline.scaling[module] for module in modules] for s in job.sources],
            dtype=torch.float64,
        ),
    )


def _check_common(
    job: Job,
    source: Source,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> None:
    for name, other in expected.items():
        one = found[name]
        if one.shape != other.shape or not torch.equal(one.double(), other.double()):
            raise FedcoreError(
                f"{source.name}: {name} differs from that of {job.sources[0].name}; "
                f"{job.method.name} needs it to be common"
            )


def finite(owner: str, name: str, values: Tensor) -> None:
    """Raise on the first value that is not finite.

    Raises:
        FedcoreError: naming owner, tensor, number and value.
    """
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise FedcoreError(
            f"{owner}: {name} holds {int(bad.sum())} values that are not finite, such as "
            f"{values[bad][0].item()}"
        )


def sound(sources: Sequence[Source], work_dtype: torch.dtype) -> dict[str, str]:
    """Read every value of every source once; source name to what is wrong, if anything."""
    problems: dict[str, str] = {}
    for source in sources:
        outline, size = source.outline, work_dtype.itemsize
        try:
            for group in module_groups([source], None, DEFAULT_GROUP_BYTES, size):
                fill_row(source, group, torch.zeros(group.layout.size, dtype=work_dtype))
            for part in dense_parts(outline, 1, DEFAULT_GROUP_BYTES, size):
                values = source.dense(part.name, part.start, part.stop)
                finite(source.name, part.name, values)
        except FedcoreError as error:
            problems[source.name] = str(error).removeprefix(f"{source.name}: ")
    return problems
