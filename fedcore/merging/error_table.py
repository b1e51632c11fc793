"""What a method loses, beside what other methods would lose on the same adapters.

The error of a result ``P`` against the mean product ``M = sum_n w_n B_n A_n`` is found from Grams
of the factors, in fp64 and without a matrix of a weight's size:

    ||M - P||^2 = ||M||^2 - 2 <M, P> + ||P||^2,    <B A, B' A'> = <B^T B', A A'^T>

The terms cancel: errors below about 1e-7 of the norms are indistinguishable from zero and given as
zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan, sqrt

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.data.compatibility import magnitudes
from fedcore.data.low_rank import LowRank
from fedcore.errors import FedcoreError
from fedcore.merging.merge import run_method
from fedcore.merging.plan import Job
from fedcore.merging.result import Merged, MethodError
from fedcore.merging.usable import check_usable, methods_for_merging
from fedcore.methods.base import FACTORS, Broadcast, Method
from fedcore.methods.shared.factor_pairs import pair_groups
from fedcore_kernels import cross_gram, product_gram
from fedcore_kernels.layout import FactorLayout

_RESOLUTION = 1e-14
"""Squared errors not above this share of the terms they are the difference of count as zero."""

_COMPARED_ROWS = 4096
"""Alternatives cost Grams of all stacked factors and are skipped above so many rows per module."""

_Pairs = dict[str, list[LowRank]]
"""Module to the products whose sum is its update."""


@dataclass
class _Sums:
    """Sums over the modules seen so far of one method."""

    lost: float = 0.0
    worst: float = -1.0
    worst_module: str = ""
    rank: int = 0
    sizes: dict[int, _Size] = field(default_factory=dict)
    refused: str = ""


@dataclass
class _Size:
    """Of one adapter that would be written, summed over modules."""

    rank: int = 0
    bytes_per_rank: int = 0
    bytes: int = 0

    def written(self, patterns: bool) -> int:
        """Bytes of the tensors, which all have the largest rank unless modules keep their own."""
        return self.bytes if patterns else self.rank * self.bytes_per_rank


def _stacks(layout: FactorLayout, rows: Tensor) -> list[tuple[tuple[str, ...], Tensor, Tensor]]:
    """Modules with their stacks ``(N, L, r, d_out)`` and ``(N, L, r, d_in)``."""
    if any(slot.factor == "B" for slot in layout.factor_slots):
        return [(group.modules, *group.stacks(rows)) for group in pair_groups(layout)]
    return [(group.modules, group.view(rows), group.view(rows)) for group in layout.groups]


def _merged_pairs(layout: FactorLayout, merged: Merged, units: Mapping[str, float]) -> _Pairs:
    pairs: _Pairs = {}
    for module in layout.modules:
        parts = []
        if module in merged.factors:
            named = merged.factors[module]
            if "B" in named:
                parts.append(LowRank(named["B"].T, named["A"]))
            else:
                factor = named["A"].double() * units.get(module, 1.0)
                parts.append(LowRank(factor, factor))
        if module in merged.residual:
            parts.append(merged.residual[module])
        pairs[module] = parts
    return pairs


class _Products:
    """The exact mean of the products of one group, by inner products with it."""

    def __init__(self, cohort: Cohort, offsets: Mapping[str, Tensor]) -> None:
        self._shares = cohort.shares
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._squares: dict[str, float] = {}
        self._scales: dict[str, float] = {}
        self.target: dict[str, float] = {}
        layout = cohort.layout
        for modules, outer, inner in _stacks(layout, cohort.updates):
            gram = product_gram(outer, inner)
            squares = (gram * self._shares).sum(-1) @ self._shares
            sizes = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() @ self._shares
            for j, module in enumerate(modules):
                self._stacks[module] = outer[:, j : j + 1], inner[:, j : j + 1]
                self._squares[module] = float(squares[j])
                self._scales[module] = float(sizes[j])
                self.target[module] = max(float(squares[j]), 0.0)
                if module in offsets:
                    start = offsets[module].double()
                    part = LowRank(start, start)
                    self.target[module] = self._distance(module, [part])
        for module, target in self.target.items():
            if target <= _RESOLUTION * self._scales[module] ** 2:
                self.target[module] = 0.0

    def lost(self, pairs: _Pairs) -> dict[str, float]:
        """Module to ``||M - sum of the pairs||^2``."""
        return {module: self._distance(module, parts) for module, parts in pairs.items()}

    def _distance(self, module: str, parts: list[LowRank]) -> float:
        if not any(part.rank for part in parts):
            return max(self._squares[module], 0.0)
        outer = torch.cat([part.outer.double() for part in parts])
        inner = torch.cat([part.inner.double() for part in parts])
        left, right = self._stacks[module]
        along = cross_gram(left, outer[None]) * cross_gram(right, inner[None])
        mixed = float(along.sum((0, 1, 3)) @ self._shares)
        square = float(((outer @ outer.T) * (inner @ inner.T)).sum())
        lost = self._squares[module] - 2 * mixed + square
        scale = (self._scales[module] + sqrt(max(square, 0.0))) ** 2
        return lost if lost > _RESOLUTION * scale else 0.0


def _offsets(job: Job) -> dict[str, Tensor]:
    """Module to its initial Gram factor in fp64, scaling absorbed, where the models subtract it."""
    if not job.offset:
        return {}
    constants, offsets = job.first.constants(), {}
    for module, unit in job.units.items():
        if f"{module}.gram_A0" not in constants:
            raise FedcoreError(f"{job.first.name}: module {module} lacks gram_A0")
        offsets[module] = constants[f"{module}.gram_A0"].double() * unit
    return offsets


def _alternatives(job: Job) -> list[Method]:
    """The other methods that need nothing but adapters, with their default options."""
    rows = max(sum(s.ranks[module] for s in job.sources) for module in job.first.outline.factors)
    if rows > _COMPARED_ROWS:
        return []
    factors = frozenset(FACTORS[job.method.family])
    return [
        check_usable(method(), previous=False, align=None)
        for method in methods_for_merging(job.method.family, previous=False)
        # A method with a factor in common differs from averaging only where there is none; a rule
        # is not another way of averaging.
        if method.name != job.method.name
        and method().plan(0).sends == factors
        and method().rule is None
    ]


@dataclass
class ErrorTally:
    """Errors of the chosen method and of ``others``, summed over the module groups.

    Attributes:
        chosen: the name of the method whose results are added.
        others: alternatives, run with their own options on every group.
        dtypes: full tensor name to the dtype that is written, which is what is judged.
        dense_bytes: of what is averaged whatever the method.
        units: module to what a written Gram factor is multiplied by to absorb its scaling; empty
            for other adapters, which are written at scale 1.
        offsets: module to a factor, scaling absorbed, whose Gram the models subtract.
        patterns: whether modules keep ranks of their own.
        normalised: whether the models normalise base weight and update together (DoRA): the error
            of the products is then not that of any weight, and none is given.
    """

    chosen: str
    others: Sequence[Method]
    dtypes: Mapping[str, torch.dtype]
    dense_bytes: int
    units: Mapping[str, float]
    offsets: Mapping[str, Tensor]
    patterns: bool
    normalised: bool
    _target: float = 0.0
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, cohort: Cohort, previous: Broadcast, merged: Merged) -> None:
        """Take the next group: the method's result in ``merged``, and run the alternatives."""
        products = _Products(cohort, self.offsets)
        self._target += sum(products.target.values())
        self._judge(self.chosen, products, _merged_pairs(cohort.layout, merged, self.units))
        for method in self.others:
            sums = self._sums.setdefault(method.name, _Sums())
            if sums.refused:
                continue
            try:
                pairs = self._pairs(method, cohort, previous)
            except FedcoreError as error:
                sums.refused = str(error).removeprefix(f"round {cohort.round}: ")
                continue
            self._judge(method.name, products, pairs)

    def rows(self) -> tuple[MethodError, ...]:
        """The chosen method first, then the others by error, then those that refused."""
        rows = [self._row(name, sums) for name, sums in self._sums.items()]
        return tuple(sorted(rows, key=lambda row: (not row.chosen, bool(row.refused), row.error)))

    def _row(self, name: str, sums: _Sums) -> MethodError:
        known = not (sums.refused or self.normalised)
        sizes = (size.written(self.patterns) for size in sums.sizes.values())
        return MethodError(
            method=name,
            chosen=name == self.chosen,
            error=sqrt(sums.lost / self._target) if known and self._target > 0 else nan,
            worst=sums.worst if known and sums.worst >= 0 else nan,
            worst_module=sums.worst_module if known else "",
            rank=sums.rank,
            bytes=self.dense_bytes + sum(sizes),
            refused=sums.refused,
        )

    def _judge(self, name: str, products: _Products, pairs: _Pairs) -> None:
        sums = self._sums.setdefault(name, _Sums())
        for module, lost in products.lost(pairs).items():
            target = products.target[module]
            sums.lost += lost
            if target > 0 and sqrt(lost / target) > sums.worst:
                sums.worst, sums.worst_module = sqrt(lost / target), module
            parts = pairs[module]
            sums.rank = max(sums.rank, sum(part.rank for part in parts))
            for k, part in enumerate(parts):
                size = sums.sizes.setdefault(k, _Size())
                size.rank = max(size.rank, part.rank)
                size.bytes += self._bytes(module, part)
                size.bytes_per_rank += self._bytes(module, part) // max(part.rank, 1)

    def _pairs(self, method: Method, cohort: Cohort, previous: Broadcast) -> _Pairs:
        result = run_method(method, cohort, previous)
        layout = cohort.layout
        pairs: _Pairs = {module: [] for module in layout.modules}
        if not method.capabilities.restarts:
            for module in layout.modules:
                inner = layout.view(result.row, layout.by_name[f"{module}.A"])
                outer = inner
                if method.family != "gram":
                    outer = layout.view(result.row, layout.by_name[f"{module}.B"])
                pairs[module].append(self._cast(module, LowRank(outer, inner)))
        for module, part in result.residual.items():
            pairs[module].append(self._cast(module, part))
        return pairs

    def _bytes(self, module: str, part: LowRank) -> int:
        """Of the tensors as they are written; a Gram adapter's factor stands there once."""
        inner, outer = (self.dtypes.get(f"{module}.{factor}") for factor in "AB")
        inner_bytes = part.inner.numel() * inner.itemsize if inner else 0
        return inner_bytes + (part.outer.numel() * outer.itemsize if outer else 0)

    def _cast(self, module: str, part: LowRank) -> LowRank:
        inner = self.dtypes[f"{module}.A"]
        outer = self.dtypes.get(f"{module}.B", inner)
        return LowRank(part.outer.to(outer), part.inner.to(inner))


def error_tally(job: Job) -> ErrorTally:
    """A tally for ``job``, with the alternatives to its method.

    Raises:
        FedcoreError: the adapters are relative to initial factors and lack one.
    """
    offsets, dense = _offsets(job), job.first.outline.dense
    return ErrorTally(
        job.method.name,
        _alternatives(job),
        job.dtypes,
        sum(tensor.numel() * job.dtypes[name].itemsize for name, tensor in dense.items()),
        job.units,
        offsets,
        job.patterns,
        bool(magnitudes(job.first.outline)),
    )
