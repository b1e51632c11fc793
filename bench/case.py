"""One comparison: operations of ours and what they are measured against, on the same operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.limits import Limits
from bench.memory import peak_bytes
from bench.timing import Call, Clock, Timing, take_turns
from fedcore_kernels import chosen_backend


@dataclass(frozen=True)
class Ours:
    """An operation of ours.

    Attributes:
        call: runs it once.
        bytes: what it must read and write at least.
        flops: what its formula takes; nominal where the algorithm iterates.
        against: names of what it is measured against: keys of the case's ``others`` or ``ours``.
        backend: the body that runs.
    """

    call: Call
    bytes: int
    flops: float
    against: tuple[str, ...]
    backend: str


@dataclass(frozen=True)
class Other:
    """What people run in place of it; ``share`` is the part of the work that ``call`` does."""

    call: Call
    share: float = 1.0


@dataclass(frozen=True)
class Case:
    """Operations on the same operands, timed in turns."""

    shape: str
    dtype: torch.dtype
    ours: Mapping[str, Ours]
    others: Mapping[str, Other] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A case that is built, with its operands, only right before it is measured."""

    name: str
    build: Callable[[], Case]


@dataclass(frozen=True)
class Row:
    """One operation against one other.

    Attributes:
        op: the operation.
        shape: of its operands.
        backend: the body that ran.
        against: what it is compared with.
        seconds: median time of one call of ours.
        ratio: the other's time over ours.
        bytes: what the operation must read and write at least.
        percent_of_copy: ``bytes / seconds`` in percent of the copy bandwidth of the same run.
        dtype: of the uploads.
        threads: of torch.
        spread: interquartile range of our times, in seconds.
        flops: nominal floating-point operations.
        peak_bytes: memory beyond the operands, where it was measured.
    """

    op: str
    shape: str
    backend: str
    against: str
    seconds: float
    ratio: float
    bytes: int
    percent_of_copy: float
    dtype: str
    threads: int
    spread: float
    flops: float
    peak_bytes: int | None = None


def one_operation(
    op: str,
    shape: str,
    operand: Tensor,
    call: Call,
    others: Mapping[str, Call],
    *,
    written: int,
    flops: float,
    read: int | None = None,
    body: str | None = None,
) -> Case:
    """The case of one operation against ``others``.

    ``operand`` decides the dtype and which body of ``body`` (``op`` by default) runs; ``read``
    bytes are its own by default.
    """
    read = operand.numel() * operand.element_size() if read is None else read
    ours = Ours(call, read + written, flops, tuple(others), chosen_backend(body or op, operand))
    named = {name: Other(other) for name, other in others.items()}
    return Case(shape, operand.dtype, {op: ours}, named)


def few_modules(modules: int, most: int) -> tuple[int, str]:
    """How many of ``modules`` a slow baseline is timed on, and how its row says so."""
    few = min(modules, most)
    return few, f" ({few} of {modules} modules)" if few < modules else ""


def measure(
    case: Case, clock: Clock, repeats: int, limits: Limits, memory: torch.device | None = None
) -> list[Row]:
    """The case's rows; ``memory`` is the device whose peaks are taken too, before any timing."""
    peaks: dict[str, int | None] = dict.fromkeys(case.ours)
    if memory is not None:
        peaks = {op: peak_bytes(ours.call, memory) for op, ours in case.ours.items()}
    calls = {name: ours.call for name, ours in case.ours.items()}
    calls |= {name: other.call for name, other in case.others.items()}
    timings = take_turns(calls, clock, repeats)
    return rows(case, timings, limits, peaks)


def rows(
    case: Case, timings: Mapping[str, Timing], limits: Limits, peaks: Mapping[str, int | None]
) -> list[Row]:
    """One row for every operation and what it is measured against."""
    compared = []
    for op, ours in case.ours.items():
        seconds = timings[op].seconds
        for against in ours.against:
            share = case.others[against].share if against in case.others else 1.0
            compared.append(
                Row(
                    op=op,
                    shape=case.shape,
                    backend=ours.backend,
                    against=against,
                    seconds=seconds,
                    ratio=timings[against].seconds / share / seconds,
                    bytes=ours.bytes,
                    percent_of_copy=100 * ours.bytes / seconds / limits.copy,
                    dtype=str(case.dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(),
                    spread=timings[op].spread,
                    flops=ours.flops,
                    peak_bytes=peaks[op],
                )
            )
    return compared
